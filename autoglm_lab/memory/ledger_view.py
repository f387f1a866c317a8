"""A ledger as text, as an HTML table and as a static bar: what shows where no JavaScript runs."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from autoglm_lab.units import format_bytes

if TYPE_CHECKING:
    from autoglm_lab.memory.ledger import Ledger, Row

# Mid-tones that read on light and on dark; weights in blues, what is nobody's in greys.
_WEIGHTS = ("#3b7dd8", "#6aa3e8", "#2f9e9e", "#5b6fd6", "#8aa0ee")
_COLOURS = {
    "kv": "#d08a1d",
    "owner": "#9b6bc7",
    "activations": "#c7557a",
    "allocator cache": "#8f8f5a",
    "context": "#7d8794",
    "driver reserved": "#5f6873",
    "unattributed": "#c94f3d",
    "other processes": "#9a9fa6",
    "free": "none",
}
_WIDTH, _HEIGHT = 720, 22


def text(ledger: Ledger) -> str:
    """Aligned columns: name, size, share of the device, what it counts."""
    lines = [f"{ledger.device}: {format_bytes(ledger.total)}, {_held(ledger)}, {ledger.phase}"]
    width = max([len(_label(row)) for row in ledger.rows] + [5])
    for row in ledger.rows:
        share = _share(row, ledger)
        lines.append(f"  {_label(row):<{width}}  {format_bytes(row.nbytes):>10}  {share:>6}  {row.counts}".rstrip())
    total = sum(row.nbytes or 0 for row in ledger.on("device"))
    if ledger.total is not None:
        lines.append(f"  {'total':<{width}}  {format_bytes(total):>10}  {'100 %':>6}")
    lines += [f"  note: {note}" for note in ledger.notes]
    return "\n".join(lines)


def html(ledger: Ledger) -> str:
    """The bar and a table. Inline styles only, so that it also shows on GitHub."""
    rows = []
    for row in ledger.rows:
        colour = colour_of(row, ledger)
        swatch = f'<span style="color:{colour}">&#9632;</span> ' if colour != "none" else "&#9633; "
        rows.append(
            f'<tr><td style="text-align:left">{swatch if row.place == "device" else ""}{escape(_label(row))}</td>'
            f'<td style="text-align:right">{format_bytes(row.nbytes)}</td>'
            f'<td style="text-align:right">{_share(row, ledger)}</td>'
            f'<td style="text-align:left">{escape(row.counts)}</td></tr>'
        )
    notes = "".join(f"<div><small>{escape(note)}</small></div>" for note in ledger.notes)
    head = "".join(f'<th style="text-align:left">{name}</th>' for name in ("owner", "size", "share", "what it counts"))
    return (
        f"<div><div><b>{escape(ledger.device)}</b>: {format_bytes(ledger.total)}, {_held(ledger)}, "
        f"{escape(ledger.phase)}</div>{svg(ledger)}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{notes}</div>"
    )


def svg(ledger: Ledger) -> str:
    """The device as one bar; slices below half a pixel are left out, a budget is a line."""
    slices = []
    x = 0.0
    scale = _WIDTH / max(1, ledger.total or 0)
    for row in ledger.on("device"):
        width = max(0, row.nbytes or 0) * scale
        colour = colour_of(row, ledger)
        if width >= 0.5 and colour != "none":
            title = escape(f"{row.name} {format_bytes(row.nbytes)}")
            slices.append(
                f'<rect x="{x:.1f}" y="1" width="{width:.1f}" height="{_HEIGHT - 2}" fill="{colour}">'
                f"<title>{title}</title></rect>"
            )
        x += width
    if ledger.budget is not None:
        at = min(_WIDTH - 1.0, ledger.budget * scale)
        slices.append(
            f'<line x1="{at:.1f}" y1="0" x2="{at:.1f}" y2="{_HEIGHT}" stroke="#c94f3d" stroke-width="2" '
            f'stroke-dasharray="4 2"><title>budget {format_bytes(ledger.budget)}</title></line>'
        )
    label = escape(f"{_held(ledger)} of {format_bytes(ledger.total)}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="100%" height="{_HEIGHT}" preserveAspectRatio="none"><rect x="0.5" y="0.5" width="{_WIDTH - 1}" '
        f'height="{_HEIGHT - 1}" fill="none" stroke="#8a8f98"/>{"".join(slices)}</svg>'
    )


def colour_of(row: Row, ledger: Ledger) -> str:
    """The row's colour: the same for a module whatever else is there."""
    if row.kind != "weights":
        return _COLOURS[row.kind]
    names = ("vision", "audio", "projector", "text", "head")
    del ledger
    return _WEIGHTS[names.index(row.name) if row.name in names else len(row.name) % len(_WEIGHTS)]


def _held(ledger: Ledger) -> str:
    held = "this process n/a" if ledger.process is None else f"this process {format_bytes(ledger.process)}"
    return held if ledger.budget is None else f"{held} of a budget of {format_bytes(ledger.budget)}"


def _label(row: Row) -> str:
    return row.name if row.place == "device" else f"{row.name} ({row.place})"


def _share(row: Row, ledger: Ledger) -> str:
    if row.nbytes is None or row.place != "device" or not ledger.total:
        return ""
    return f"{100 * row.nbytes / ledger.total:.1f} %"
