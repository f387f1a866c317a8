from __future__ import annotations

import base64
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from autoglm_lab.figures import Table, bars, lines

SVG = "{http://www.w3.org/2000/svg}"


def test_a_table_aligns_figures_right_and_words_left() -> None:
    table = Table(("module", "bytes", "why"), (("视觉", "1.5 MiB", "used"), ("audio", "–", "parked")))
    assert str(table) == (
        "module    bytes  why\n"
        "------  -------  ------\n"
        "视觉    1.5 MiB  used\n"
        "audio         –  parked"
    )  # fmt: skip


def test_a_table_escapes_what_it_shows() -> None:
    html = Table(("a",), (("<script>",),))._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_figure_has_data_for_plotly_a_picture_and_text() -> None:
    figure = bars("Sizes", ["vision", "audio"], {"claimed": [2.1, None], "computed": [0.5, 1.0]}, unit="GB")
    bundle = figure._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "text/html", "text/plain"}
    assert bundle["text/plain"] == (
        "        claimed (GB)  computed (GB)\n"
        "------  ------------  -------------\n"
        "vision          2.10           0.50\n"
        "audio              –           1.00"
    )  # fmt: skip
    assert "<svg" in bundle["text/html"]
    assert "<table>" in bundle["text/html"]


def test_nothing_in_a_figure_is_fetched_from_elsewhere() -> None:
    html = bars("Sizes", ["a"], {"x": [1.0]}, unit="GB")._repr_mimebundle_()["text/html"]
    assert "<script" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


def test_values_go_to_plotly_as_float32_arrays() -> None:
    figure = bars("Sizes", ["a", "b"], {"x": [1.5, 2.5]}, unit="GB")
    values = figure._repr_mimebundle_()["application/vnd.plotly.v1+json"]["data"][0]["x"]
    assert values["dtype"] == "f4"
    assert np.frombuffer(base64.b64decode(values["bdata"]), np.float32).tolist() == [1.5, 2.5]


def test_the_lengths_of_the_bars_are_in_proportion_and_one_that_is_not_known_has_none() -> None:
    figure = bars("Sizes", ["a", "b", "c"], {"x": [1.0, 4.0, None]}, unit="GB")
    widths = [
        float(bar.get("width", "")) for bar in ET.fromstring(figure.svg).iter(f"{SVG}rect") if bar.get("height") == "14"
    ]
    assert widths == [pytest.approx(widths[1] / 4, abs=0.1), widths[1], 0.0]


def test_stacked_bars_stand_one_after_another_and_show_their_sum() -> None:
    figure = bars("Card", ["a"], {"x": [1.0], "y": [2.0]}, unit="GiB", stacked=True)
    drawing = ET.fromstring(figure.svg)
    first, second = [bar for bar in drawing.iter(f"{SVG}rect") if bar.get("height") == "14"]
    assert float(second.get("x", "")) == pytest.approx(
        float(first.get("x", "")) + float(first.get("width", "")), abs=0.1
    )
    assert "3.00" in [text.text for text in drawing.iter(f"{SVG}text")]


def test_lines_rise_and_points_are_named() -> None:
    figure = lines(
        "KV", [512, 1024], {"a": [0.1, 0.2]}, axes=("tokens", "GB"), points={"claimed": (512, 3.0)}
    )  # fmt: skip
    path = next(ET.fromstring(figure.svg).iter(f"{SVG}polyline")).get("points", "")
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in path.split())
    assert x1 > x0
    assert y1 < y0, "up is a smaller y"
    assert "512: claimed" in str(figure.table)


def test_series_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="series 'x' has 1 values for 2 labels"):
        bars("Sizes", ["a", "b"], {"x": [1.0]}, unit="GB")


def test_a_missing_part_of_a_bar_does_not_begin_the_bar_anew() -> None:
    drawn = bars(
        "t", ["load", "prefill"], {"weights": [19.0, 19.0], "KV": [None, 0.5]}, unit="GiB", stacked=True
    ).plotly
    assert [*drawn.data[1].x] == [0.0, 0.5]
    assert [*drawn.data[1].text] == ["", "0.50"]
