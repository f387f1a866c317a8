"""The dashboard without JavaScript: a static picture of the device, its ledger as a table, and the policy."""

from __future__ import annotations

import base64
from html import escape

from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import format_bytes
from autoglm_lab.widgets.device_bar import segments
from autoglm_lab.widgets.palette import STILL, colour_key
from autoglm_lab.widgets.snapshot import Snapshot

_WIDTH, _HEIGHT = 720, 34
_DELAY = (
    "<style>@keyframes algm-appear{from{max-height:0;visibility:hidden}to{max-height:none;visibility:visible}}"
    ".algm-still{overflow:hidden;animation:algm-appear 0s 1.5s both}</style>"
)


def plain(snapshot: Snapshot) -> str:
    """The same text at every run: what is shown, none of its figures."""
    return f"Dashboard of {snapshot.capabilities.model} ({', '.join(module.name for module in snapshot.modules)})"


def page(snapshot: Snapshot, mark: str = "") -> str:
    """The dashboard's state as HTML that needs neither JavaScript nor network.

    Args:
        snapshot: what to show.
        mark: hexadecimal; the live dashboard hides the page with this mark when it appears.
    """
    able = snapshot.capabilities
    title = " · ".join(part for part in (able.model, able.dtype, able.where, able.device) if part)
    if snapshot.absent:
        told = f"<p>memory: not available from {escape(snapshot.absent)}</p>"
        load = f"<p>KV: {escape(str(snapshot.load))}</p>" if snapshot.load and str(snapshot.load) else ""
        return f'{_DELAY}<div class="algm-still algm-still-{mark}"><p><b>{escape(title)}</b></p>{told}{load}</div>'
    return (
        f'{_DELAY}<div class="algm-still algm-still-{mark}"><p><b>{escape(title)}</b></p>'
        f"{''.join(_image(one) + ledger_table(one) for one in snapshot.ledgers)}{_modules(snapshot)}"
        f"<p>Policy</p><pre>{escape(policy_text(snapshot.policy))}</pre></div>"
    )


def policy_text(policy: MemoryPolicy) -> str:
    """The policy as YAML, or a word where it is all defaults."""
    text = policy.to_yaml().strip()
    return "# every setting is at its default" if text == "{}" else text


def ledger_table(ledger: Ledger) -> str:
    """The ledger's rows as an HTML table."""
    rows = [
        _line(
            f'<span style="color:{STILL[colour_key(row)]}">■</span> {escape(row.name)}',
            row.place,
            format_bytes(row.nbytes),
            escape(row.counts),
        )
        for row in ledger.rows
    ]
    whole = _line(f"<b>{escape(ledger.device)}</b>", "device", f"<b>{format_bytes(ledger.total)}</b>", "")
    return f"<table>{_line('owner', 'place', 'size', 'what it counts', cell='th')}{''.join(rows)}{whole}</table>"


def _line(*cells: str, cell: str = "td") -> str:
    """A table row; the third cell is a figure."""
    sides = ("left", "left", "right", "left")
    drawn = (f'<{cell} style="text-align:{side}">{text}</{cell}>' for side, text in zip(sides, cells, strict=True))
    return f"<tr>{''.join(drawn)}</tr>"


def bar_svg(ledger: Ledger) -> str:
    """Two bars as an SVG document: the whole device, and this process magnified."""
    parts = segments(ledger)
    own = [part for part in parts if part["scope"] != "device"]
    process = sum(part["nbytes"] or 0 for part in own)
    height = 2 * _HEIGHT + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#6e7781">'
        f'<text x="0" y="12">device {format_bytes(ledger.total)}</text>{_bar(parts, ledger.total, 18)}'
        f'<text x="0" y="{_HEIGHT + 32}">of which this process {format_bytes(process)}</text>'
        f"{_bar(own, process, _HEIGHT + 38)}</svg>"
    )


def _bar(parts: list[dict[str, object]], whole: int | None, top: int) -> str:
    drawn, left = [], 0.0
    for part in parts:
        nbytes = max(0, part["nbytes"]) if isinstance(part["nbytes"], int) else 0
        width = _WIDTH * nbytes / max(whole or 0, 1)
        text = escape(f"{part['name']} {format_bytes(nbytes)}")
        size = f'x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_HEIGHT - 8}"'
        drawn.append(f'<rect {size} fill="{STILL[str(part["colour"])]}"><title>{text}</title></rect>')
        if width > 7.5 * len(text):
            drawn.append(f'<text x="{left + 6:.1f}" y="{top + 17}" fill="#1c1f23">{text}</text>')
        left += width
    return "".join(drawn)


def _image(ledger: Ledger) -> str:
    data = base64.b64encode(bar_svg(ledger).encode()).decode()
    return f'<p><img alt="memory of the device by owner" src="data:image/svg+xml;base64,{data}"></p>'


def _modules(snapshot: Snapshot) -> str:
    rows = [
        _line(
            escape(module.name),
            module.place,
            format_bytes(module.nbytes),
            snapshot.policy.module(module.name).residency,
        )
        for module in snapshot.modules
    ]
    return f"<table>{_line('module', 'place', 'size', 'residency', cell='th')}{''.join(rows)}</table>"
