from __future__ import annotations

import base64
import re
from dataclasses import replace
from xml.etree import ElementTree as ET

from autoglm_lab.memory.ledger import Ledger, Row
from autoglm_lab.units import format_bytes
from autoglm_lab.widgets.snapshot import take
from autoglm_lab.widgets.still import bar_svg, page, plain

LEDGER = Ledger(
    "CPU, <memory>",
    1000,
    600,
    (
        Row("text", "weights", "device", 400, "weights"),
        Row("audio", "weights", "disk", 50, "on disk"),
        Row("KV <script>", "kv", "device", 100),
        Row("unattributed", "unattributed", "device", -20),
        Row("context", "context", "device", 120),
        Row("free", "free", "device", 400),
    ),
    0.0,
)


def test_the_picture_shows_the_device_to_scale():
    root = ET.fromstring(bar_svg(LEDGER))
    widths = [float(rect.get("width", 0)) for rect in root.iter("{http://www.w3.org/2000/svg}rect")]
    whole = 720
    assert widths[0] == whole * 0.4
    assert min(widths) >= 0
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "text 400 B" in titles
    assert "KV <script> 100 B" in titles


def test_the_page_needs_no_script_and_no_network_and_escapes_names(wb):
    html = page(replace(take(wb), ledger=LEDGER), mark="ab12")
    assert "<script" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "KV &lt;script&gt;" in html
    assert 'class="algm-still algm-still-ab12"' in html


def test_the_page_has_every_row_every_module_and_the_policy(wb):
    wb.policy = wb.policy.replace(modules={"audio": "off"})
    snapshot = take(wb)
    html = page(snapshot)
    for row in snapshot.ledger.rows:
        assert f"</span> {row.name}</td>" in html
    assert format_bytes(snapshot.ledger.total) in html
    assert re.search(r">audio</td><td[^>]*>disk</td><td[^>]*>[\d.]+ MiB</td><td[^>]*>off</td>", html)
    assert "residency: &#x27;off&#x27;" in html
    picture = re.search(r"base64,([^\"]+)", html)
    assert picture is not None
    assert base64.b64decode(picture[1]).startswith(b"<svg")


def test_the_plain_text_has_no_figures(wb):
    assert plain(take(wb)) == "Dashboard of autoglm-tiny (vision, audio, projector, text)"
