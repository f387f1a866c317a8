"""The same figures as SVG, in the colour of the surrounding text, for where no JavaScript runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

COLOURS = ("#4269d0", "#efb118", "#6cc5b0", "#a463f2", "#9c6b4e", "#ff725c")
POINT = "#c0564b"

_WIDTH, _LEFT, _RIGHT = 720.0, 130.0, 680.0


def written(value: float | None, write: Callable[[float], str]) -> str:
    """A value as text; a dash where there is none."""
    return "–" if value is None else write(value)


def bars(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    unit: str,
    stacked: bool,
    write: Callable[[float], str],
) -> str:
    """Horizontal bars as SVG; the arguments are those of `figure.bars`."""
    groups = list(zip(*series.values(), strict=True))
    lengths = [[value or 0.0 for value in values] for values in groups]
    longest = max((sum(values) if stacked else max(values) for values in lengths), default=0) or 1
    scale = (_RIGHT - _LEFT - 60) / longest
    parts, y = _legend(dict(zip(series, COLOURS, strict=False))), 60.0
    for label, values in zip(labels, groups, strict=True):
        height = 16.0 * (1 if stacked else len(values))
        parts.append(_text(_LEFT - 8, y + height / 2 + 3, label, anchor="end"))
        x = _LEFT
        for i, value in enumerate(values):
            top = y if stacked else y + 16 * i
            width = 0.0 if value is None else max(value * scale, 0.5)
            parts.append(f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="14" fill="{COLOURS[i]}"/>')
            if stacked:
                x += width
            else:
                parts.append(_text(x + width + 5, top + 11, written(value, write)))
        if stacked:
            parts.append(_text(x + 5, y + 11, write(sum(value or 0.0 for value in values))))
        y += height + 12
    parts.append(_text(_RIGHT, y + 4, unit, anchor="end"))
    return _frame(title, y + 14, parts)


def lines(
    title: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    points: Mapping[str, tuple[float, float]],
    axes: tuple[str, str],
    write: Callable[[float], str],
) -> str:
    """Lines on logarithmic axes as SVG; the arguments are those of `figure.lines`."""
    top, bottom = 76.0, 330.0
    heights = [value for values in series.values() for value in values] + [value for _, value in points.values()]
    low, high = math.floor(math.log10(min(heights))), math.ceil(math.log10(max(heights)))

    def across(value: float) -> float:
        return _LEFT + math.log(value / x[0]) / math.log(x[-1] / x[0]) * (_RIGHT - _LEFT)

    def up(value: float) -> float:
        return bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    parts = _legend({**dict(zip(series, COLOURS, strict=False)), **dict.fromkeys(points, POINT)})
    for power in range(low, high + 1):
        y = up(10.0**power)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="currentColor" opacity="0.15"/>')
        parts.append(_text(_LEFT - 8, y + 4, write(10.0**power), anchor="end"))
    parts += [_text(across(value), bottom + 18, f"{value:,.0f}", anchor="middle") for value in x]
    for colour, values in zip(COLOURS, series.values(), strict=False):
        path = " ".join(f"{across(at):.1f},{up(value):.1f}" for at, value in zip(x, values, strict=True))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for at, value in points.values():
        spot = f'cx="{across(at):.1f}" cy="{up(value):.1f}"'
        parts.append(f'<circle {spot} r="5" fill="none" stroke="{POINT}" stroke-width="3"/>')
    parts.append(_text((_LEFT + _RIGHT) / 2, bottom + 38, axes[0], anchor="middle"))
    parts.append(_text(_LEFT, top - 10, axes[1]))
    return _frame(title, bottom + 46, parts)


def _frame(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {_WIDTH:.0f} {height:.0f}" width="100%" style="max-width:{_WIDTH:.0f}px;display:block" '
        f'font-family="system-ui, sans-serif" font-size="12">{_text(0, 16, title, weight=600)}{"".join(parts)}</svg>'
    )


def _legend(colours: Mapping[str, str]) -> list[str]:
    """Names in a row, each behind a square of its colour; their widths are estimated, since nothing can be measured."""
    parts, x = [], _LEFT
    for name, colour in colours.items():
        parts.append(f'<rect x="{x:.0f}" y="32" width="11" height="11" fill="{colour}"/>{_text(x + 16, 42, name)}')
        x += 34 + 6.6 * len(name)
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start", weight: int = 400) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {place} fill="currentColor">{escape(text)}</text>'
