"""A plan as a picture: its largest phase, owner upon owner, up to the limit."""

from __future__ import annotations

from autoglm_lab.figures.figure import Figure, bars
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.units import GiB

_KINDS = {
    "weights": "weights",
    "kv": "keys and values",
    "activations": "activations",
    "allocator cache": "activations",
    "context": "context and libraries",
    "owner": "graphs, workspaces, stores",
}


def waterfall(plan: Plan) -> Figure:
    """The phases as bars of their parts, the limit beside them."""
    kinds = list(dict.fromkeys(_KINDS.values()))
    labels = [phase.name for phase in plan.phases]
    series: dict[str, list[float | None]] = {
        kind: [
            sum(row.nbytes for row in phase.rows if _KINDS.get(row.kind) == kind) / GiB or None for phase in plan.phases
        ]
        for kind in kinds
    }
    series = {kind: [*values, None] for kind, values in series.items()}
    series["limit"] = [*(None for _ in labels), plan.limit / GiB]
    return bars(f"{plan.model}: {plan.verdict}", [*labels, "limit"], series, unit="GiB", stacked=True)
