"""Bars and lines: from one set of data the plotly figure, the picture and the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoglm_lab.figures import picture
from autoglm_lab.figures.table import Table


@dataclass(frozen=True, repr=False)
class Figure:
    """A plotly figure, with the picture and the table that stand in for it.

    Attributes:
        plotly: the `plotly.graph_objects.Figure`, to go on working with.
        svg: the same as a picture.
        table: the same as text.
    """

    plotly: Any
    svg: str
    table: Table

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {
            "application/vnd.plotly.v1+json": json.loads(self.plotly.to_json()),
            "text/html": f"{self.svg}{self.table._repr_html_()}",
            "text/plain": str(self.table),
        }

    def __repr__(self) -> str:
        return str(self.table)


def bars(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    unit: str,
    stacked: bool = False,
    write: Callable[[float], str] = "{:,.2f}".format,
) -> Figure:
    """Horizontal bars: a group for each label; in it a bar, or a part of one bar, for each series.

    Args:
        title: what is shown.
        labels: names of the groups, from the top down.
        series: by name, one value for each label; None where there is none, which is not zero.
        unit: of the values.
        stacked: the series are parts of one bar.
        write: a value as text.

    Raises:
        ValueError: a series has not one value for each label.
    """
    import plotly.graph_objects as go

    _check(series, labels)
    figure = go.Figure()
    for i, (name, values) in enumerate(series.items()):
        lengths = np.asarray(values, np.float32)
        figure.add_bar(
            name=name,
            x=np.nan_to_num(lengths) if stacked else lengths,  # plotly begins a bar anew after a part that is missing
            y=list(labels),
            orientation="h",
            marker_color=picture.COLOURS[i],
            text=["" if stacked and value is None else picture.written(value, write) for value in values],
            hovertemplate=f"%{{y}}: %{{text}} {unit}<extra>{name}</extra>",
        )
    figure.update_layout(barmode="stack" if stacked else "group", xaxis_title=unit, **_layout(title))
    figure.update_yaxes(autorange="reversed")
    rows = tuple(
        (label, *(picture.written(values[i], write) for values in series.values())) for i, label in enumerate(labels)
    )
    table = Table(("", *(f"{name} ({unit})" for name in series)), rows)
    return Figure(figure, picture.bars(title, labels, series, unit, stacked, write), table)


def lines(
    title: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    axes: tuple[str, str],
    points: Mapping[str, tuple[float, float]] | None = None,
    write: Callable[[float], str] = "{:,.3g}".format,
) -> Figure:
    """Lines over ``x``, both axes logarithmic, with single named points.

    Args:
        title: what is shown.
        x: positive values, ascending.
        series: by name, one positive value for each of ``x``.
        axes: what the axes show, with the unit.
        points: by name, ``(x, y)``.
        write: a value of ``y`` as text.

    Raises:
        ValueError: a series has not one value for each of ``x``.
    """
    import plotly.graph_objects as go

    _check(series, x)
    points = points or {}
    figure = go.Figure()
    for i, (name, values) in enumerate(series.items()):
        line = {"name": name, "mode": "lines+markers", "line_color": picture.COLOURS[i]}
        figure.add_scatter(x=np.asarray(x, np.float32), y=np.asarray(values, np.float32), **line)
    for name, (at, value) in points.items():
        marker = {"symbol": "circle-open", "size": 12, "color": picture.POINT, "line": {"width": 3}}
        figure.add_scatter(
            x=np.asarray([at], np.float32), y=np.asarray([value], np.float32), name=name, mode="markers", marker=marker
        )
    figure.update_layout(xaxis_title=axes[0], yaxis_title=axes[1], **_layout(title))
    figure.update_xaxes(type="log", tickvals=list(x), ticktext=[f"{value:,.0f}" for value in x])
    figure.update_yaxes(type="log")
    rows = [(f"{at:,.0f}", *(write(values[i]) for values in series.values())) for i, at in enumerate(x)]
    blank = ("",) * (len(series) - 1)
    rows += [(f"{at:,.0f}: {name}", write(value), *blank) for name, (at, value) in points.items()]
    svg = picture.lines(title, x, series, points, axes, write)
    return Figure(figure, svg, Table((axes[0], *series), tuple(rows)))


def _check(series: Mapping[str, Sequence[Any]], labels: Sequence[object]) -> None:
    for name, values in series.items():
        if len(values) != len(labels):
            raise ValueError(f"series {name!r} has {len(values)} values for {len(labels)} labels")


def _layout(title: str) -> dict[str, Any]:
    """Without a background and in a middling grey, which reads on light and dark pages."""
    return {
        "title": {"text": title, "x": 0, "font": {"size": 14}},
        "template": "none",
        "height": 420,
        "margin": {"l": 130, "r": 30, "t": 80, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "#7d8590"},
        "legend": {"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0},
    }
