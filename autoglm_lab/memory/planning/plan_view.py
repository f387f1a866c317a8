"""A plan as text and as an HTML table: what shows where no JavaScript runs."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from autoglm_lab.units import format_bytes

if TYPE_CHECKING:
    from autoglm_lab.memory.planning.plan import Alternative, Plan

_SHOWN = 5
_COLOURS = {"fits": "#2e8b57", "fits with changes": "#c98a1b", "does not fit": "#c94f3d"}

_FIGURE = "text-align:right;white-space:nowrap"


def text(plan: Plan) -> str:
    """The verdict in a sentence, a row for each owner with a column for each phase, then what would help."""
    names = row_names(plan)
    width = max(len(name) for name in (*names, "with what may go"))
    lines = [_sentence(plan), f"  {_circumstances(plan)}"]
    lines.append(f"  {'':<{width}}" + "".join(f"{phase.name:>12}" for phase in plan.phases))
    for name in names:
        cells = [phase.of(name) for phase in plan.phases]
        lines.append(f"  {name:<{width}}" + "".join(f"{format_bytes(cell) if cell else '–':>12}" for cell in cells))
    for name, sums in _sums(plan):
        lines.append(f"  {name:<{width}}" + "".join(f"{one:>12}" for one in sums))
    lines += [f"  {one}" for one in (*plan.why.splitlines(), *_advice(plan))]
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)


def html(plan: Plan) -> str:
    """The same with inline styles only."""
    colour = _COLOURS[plan.verdict]
    head = "".join(f'<th style="text-align:right">{phase.name}</th>' for phase in plan.phases)
    body = []
    for name in row_names(plan):
        counts = next((row.counts for phase in plan.phases for row in phase.rows if row.name == name), "")
        cells = "".join(
            f'<td style="{_FIGURE}">{format_bytes(phase.of(name)) if phase.of(name) else "–"}</td>'
            for phase in plan.phases
        )
        body.append(
            f'<tr><td style="text-align:left">{escape(name)}</td>{cells}'
            f'<td style="text-align:left">{escape(counts)}</td></tr>'
        )
    for name, sums in _sums(plan):
        cells = "".join(f'<td style="{_FIGURE}"><b>{one}</b></td>' for one in sums)
        body.append(f'<tr><td style="text-align:left"><b>{name}</b></td>{cells}<td></td></tr>')
    rest = "".join(f"<div>{escape(one)}</div>" for one in (*plan.why.splitlines(), *_advice(plan)))
    notes = "".join(f"<div><small>{escape(note)}</small></div>" for note in plan.notes)
    return (
        f'<div><div><b style="color:{colour}">{escape(_sentence(plan))}</b></div>'
        f"<div>{escape(_circumstances(plan))}</div>"
        f'<table><thead><tr><th style="text-align:left">owner</th>{head}<th style="text-align:left">what it counts</th>'
        f"</tr></thead><tbody>{''.join(body)}</tbody></table>{rest}{notes}</div>"
    )


def _sums(plan: Plan) -> list[tuple[str, list[str]]]:
    needed = "needed", [format_bytes(phase.needed) for phase in plan.phases]
    peak = "with what may go", [format_bytes(phase.nbytes) for phase in plan.phases]
    return [needed] if needed[1] == peak[1] else [needed, peak]


def row_names(plan: Plan) -> list[str]:
    """The names of all rows, in the order they first appear."""
    return list(dict.fromkeys(row.name for phase in plan.phases for row in phase.rows if row.nbytes))


def _sentence(plan: Plan) -> str:
    largest, limit = plan.largest, format_bytes(plan.limit)
    peak = f"{format_bytes(largest.needed)} in {largest.name}, of {limit}"
    if plan.fits:
        return f"{plan.model} fits: {peak}; {format_bytes(plan.margin)} to spare"
    missing = [f"{format_bytes(-plan.margin)} missing"] if plan.margin < 0 else []
    if plan.host_missing:
        missing.append(
            f"keys, values and parked weights need {format_bytes(plan.host_needed)} of the host, "
            f"which has {format_bytes(plan.host_limit)}"
        )
    return f"{plan.model} {plan.verdict}: {peak}; {'; '.join(missing)}"


def _circumstances(plan: Plan) -> str:
    label = f"{plan.device} (estimated)" if plan.estimated else plan.device
    return f"{label}, {plan.dtype}: {plan.workload}"


def _advice(plan: Plan) -> list[str]:
    if plan.fits:
        return []
    if not plan.alternatives:
        return ["nothing in the policy frees enough: a smaller model, image or prompt, or a larger device"]
    head = "what would help:" if plan.verdict == "fits with changes" else "what would help, though not enough:"
    return [head, *(_told(one) for one in plan.alternatives[:_SHOWN])]


def _told(one: Alternative) -> str:
    verdict = "fits" if one.fits else "does not fit"
    return f"- {one.change}: {format_bytes(one.nbytes)}, {verdict}; frees {format_bytes(one.frees)}; {one.costs}"
