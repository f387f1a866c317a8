"""The plan: what the settings will need for a workload, beside what is held now, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from autoglm_lab.costs import cost_of
from autoglm_lab.engine.policy_difference import difference
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.planning.likely import likely
from autoglm_lab.memory.planning.plan import Alternative, Plan
from autoglm_lab.memory.planning.plan_record import PlanErrors
from autoglm_lab.memory.planning.planner import planner
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.units import MiB
from autoglm_lab.widgets.palette import OUTSIDE_KINDS, colour_key, rank
from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.settings import set_policy
from autoglm_lab.widgets.snapshot import Snapshot

MOST_IMAGES: Final = 8
MOST_CONVERSATIONS: Final = 16
_SHOWN = 4
_FIRST_CONTEXT = 4096
_STEADY = 256 * MiB


def plan_state(plan: Plan | None, workload: Workload, snapshot: Snapshot) -> dict[str, Any]:
    """The plan's verdict and rows beside the ledger's, the workload and its limits, and the alternatives; in bytes."""
    able = snapshot.capabilities
    state: dict[str, Any] = {
        "context": workload.context,
        "new_tokens": workload.new_tokens,
        "images": workload.images,
        "conversations": workload.conversations,
        "steps": context_steps(able.context_tokens, workload.new_tokens),
        "most_images": MOST_IMAGES if "image" in able.modalities else 0,
        "most_conversations": MOST_CONVERSATIONS,
        "control": able.memory_control,
        "verdict": None,
    }
    if plan is None:
        return state
    helping = [one for one in plan.alternatives if one.fits] or plan.alternatives
    return state | {
        "verdict": plan.verdict,
        "margin": plan.margin if plan.margin < 0 or not plan.host_missing else -plan.host_missing,
        "limit": plan.limit,
        "by": "device" if plan.policy.budget is None or plan.limit < plan.policy.budget else "budget",
        "phase": plan.largest.name,
        "phases": [{"name": phase.name, "nbytes": phase.needed} for phase in plan.phases],
        "planned": plan.largest.needed,
        "measured": _measured(snapshot),
        "rows": rows(plan, snapshot),
        "alternatives": [alternative(plan, one) for one in helping[:_SHOWN]],
        "notes": list(plan.notes),
        "estimated": plan.estimated,
    }


def rows(plan: Plan, snapshot: Snapshot) -> list[dict[str, Any]]:
    """Owners of the process with what the plan's largest phase has of them and what the ledger has now.

    Weights and other owners keep their names; of every other kind there is one row.
    """
    needed = [row for row in plan.largest.rows if not row.spare]
    planned = [Row(row.name, row.kind, "device", row.nbytes, row.counts) for row in needed]
    held = [row for row in snapshot.ledger.on("device") if row.kind not in OUTSIDE_KINDS]
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for column, entries in (("planned", planned), ("measured", held)):
        for row in sorted(entries, key=rank):
            name = row.name if row.kind in ("weights", "owner") else "KV" if row.kind == "kv" else row.kind
            entry = table.setdefault(
                (row.kind, name),
                {"name": name, "kind": row.kind, "colour": _colour(row), "planned": 0, "measured": 0, "at": rank(row)},
            )
            entry[column] += row.nbytes or 0
    found = sorted(table.values(), key=lambda entry: entry["at"])
    return [{key: value for key, value in entry.items() if key != "at"} for entry in found if _counts(entry)]


def alternative(plan: Plan, one: Alternative) -> dict[str, Any]:
    """One alternative: the settings that differ as people write them, their kinds of cost, and which were measured."""
    changes = difference(plan.policy, one.policy)
    return {
        "change": one.change,
        "costs": sorted(set(_costs(changes))),
        "measured": [switch for switch in _switches(changes) if cost_of(switch)],
        "lossy": one.lossy,
        "nbytes": one.nbytes,
        "frees": one.frees,
        "fits": one.fits,
        "reload": one.reload,
    }


def errors_state(errors: PlanErrors | None) -> dict[str, float] | None:
    """How far off plans were on this machine, in shares."""
    return None if errors is None else {"last": errors.last, "median": errors.median, "count": errors.count}


def context_steps(context: int | None, new_tokens: int) -> list[int]:
    """Powers of two from 256 tokens up, then as much as the model takes beside the answer."""
    most = max(256, (context or 131072) - new_tokens)
    steps, step = [], 256
    while step < most:
        steps.append(step)
        step *= 2
    return [*steps, most]


def _costs(changes: Mapping[str, Any]) -> Iterable[str]:
    for name, settings in changes.get("modules", {}).items():
        yield "weights" if "precision" in settings else f"{settings['residency']} {name}"
    yield from changes.get("placement", {})
    yield from {"max_image_tokens"} & changes.keys()
    kinds = ("precision", "max_tokens", "chunk", "place", "graphs", "encoder_bytes")
    yield from (kind for kind in kinds if kind in changes.get("kv", {}))


def _switches(changes: Mapping[str, Any]) -> Iterable[str]:
    """The settings of weights and of keys and values as `costs.SETTINGS` names them."""
    yield f"kv {changes.get('kv', {}).get('precision')}"
    yield f"weights {changes.get('modules', {}).get('text', {}).get('precision')}"


def _trace_ahead(bench: Any, workload: Workload) -> None:
    """Let what a person is likely to try next be traced while the engine rests, so that no switch waits for it."""
    admission = _admission_of(bench)
    if admission is not None:
        predict = planner(bench.outline(), bench.plan_device(bench.policy.budget))
        asked = likely(predict, bench.policy, workload)
        admission.ahead(partial(predict.plan, policy, work, search=False) for policy, work in asked)


def _errors_of(bench: Any) -> PlanErrors | None:
    admission = _admission_of(bench)
    return None if admission is None else admission.errors()


def _admission_of(bench: Any) -> Any:
    """What lets turns in, in this process; None: behind a server, or the model lies on several devices."""
    return getattr(getattr(bench.engine, "state", None), "admission", None)


def _colour(row: Row) -> str:
    return "kv" if row.kind == "kv" else colour_key(row)


def _counts(entry: Mapping[str, Any]) -> bool:
    return bool(entry["planned"] or entry["measured"])


def _measured(snapshot: Snapshot) -> int:
    ledger = snapshot.ledger
    if ledger.process is not None:
        return ledger.process
    return sum(row.nbytes or 0 for row in ledger.on("device") if row.kind not in OUTSIDE_KINDS)


class PlanPanel(Panel):
    """The predicted peak beside what is held, for a workload that one sets here, and alternatives to apply."""

    name = "plan_panel"
    of_memory = True

    def __init__(self, host: Any = None, **settings: Any) -> None:
        """As `Panel`."""
        self._workload: Workload | None = None
        self._plan: Plan | None = None
        self._asked: object = None
        self._errors: PlanErrors | None = None
        self._ahead: object = None
        super().__init__(host, **settings)

    @property
    def warning(self) -> dict[str, Any] | None:
        """Where the plan does not fit: bytes that are missing, the phase, and the workload; None where it does."""
        plan = self._plan
        if plan is None or plan.fits:
            return None
        work = plan.workload
        return {
            "missing": max(-plan.margin, plan.host_missing),
            "phase": plan.largest.name,
            "context": work.context,
            "images": work.images,
            "conversations": work.conversations,
        }

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        workload = self._workload_for(snapshot)
        self._look(snapshot)
        return plan_state(self._plan, workload, snapshot) | {"errors": errors_state(self._errors)}

    def do_workload(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Change one figure of the workload: ``context``, ``images`` or ``conversations``."""
        figure, value = str(content["figure"]), int(content["value"])
        if figure not in ("context", "images", "conversations"):
            raise ValueError(f"a workload has context, images and conversations, not {figure!r}")
        if self.host is None or self._workload is None:
            return
        self._workload = replace(self._workload, **{figure: value})  # type: ignore[arg-type]
        self._foresee()

    def do_apply(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Use an alternative that is shown, named by its change."""
        plan, change = self._plan, content["change"]
        chosen = next((one for one in plan.alternatives if one.change == change), None) if plan else None
        if self.host is None or plan is None or chosen is None:
            return
        bench, changes = self.host.bench, difference(plan.policy, chosen.policy)
        self.run(f"apply {change}", lambda: set_policy(bench, **changes))

    def _workload_for(self, snapshot: Snapshot) -> Workload:
        new_tokens = snapshot.policy.generation.max_new_tokens
        if self._workload is None:
            steps = context_steps(snapshot.capabilities.context_tokens, new_tokens)
            context = max(step for step in steps if step <= max(_FIRST_CONTEXT, steps[0]))
            self._workload = Workload(context, new_tokens, images=int("image" in snapshot.capabilities.modalities))
        elif self._workload.new_tokens != new_tokens:
            self._workload = replace(self._workload, new_tokens=new_tokens)
        return self._workload

    def _look(self, snapshot: Snapshot) -> None:
        """Plan anew where something changed that a plan depends on."""
        turns = sum(one.turns for one in snapshot.conversations)  # an answer tells how right the plan was
        asked = (snapshot.policy, snapshot.ledger.nbytes("other processes") // _STEADY, turns)
        if asked != self._asked and snapshot.capabilities.memory_control:
            self._asked = asked
            self._foresee()

    def _foresee(self) -> None:
        """Plan on a worker thread: first whether it fits, then, where it does not, what would."""
        host = self.host
        if host is None:
            return
        bench = host.bench

        def plan() -> None:
            self._errors = _errors_of(bench)
            self._plan = bench.plan(None, self._workload, search=False)
            if not self._plan.fits:
                host.wake()
                self._plan = bench.plan(None, self._workload, search=True)
            kept_in = self._plan.policy.kv.precision, self._plan.policy.precisions()
            if self._ahead != kept_in:
                self._ahead = kept_in
                _trace_ahead(bench, self._plan.workload)

        self.run("plan", plan, lane="plan")
