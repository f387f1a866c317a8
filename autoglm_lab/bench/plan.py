"""Plans against what was measured, a fresh process a row; and budgets that a plan says fit, or do not.

Measured: the most that torch's allocator, weights and pages held together, and the most that the driver showed beside
them. Its peer is what accelerate's ``estimate-memory`` says of the same model and dtype: the weights.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autoglm_lab.bench import plan_rows
from autoglm_lab.bench.bench import Bench, card_or_device
from autoglm_lab.bench.fresh import fresh
from autoglm_lab.bench.plan_models import made_up_processor, source
from autoglm_lab.bench.plan_rows import PHONE, Setting
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.errors import LabError
from autoglm_lab.memory.planning.device_constants import PlanDevice, plan_device
from autoglm_lab.memory.planning.plan import PhasePlan, Plan
from autoglm_lab.memory.planning.plan_choice import choose
from autoglm_lab.memory.planning.planner import Planner, planner
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.loading import Outline, outline
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB

_OFF, _UNDER, _REST, _APART = 2.0, -1.0, 5.0, 1.0
_ABOVE, _BELOW = 1.03, 0.99
_PATIENCE = 400
_AT_ONCE = 8
_SHARED = 0.92
"""The share of what is free that plans of rows may add up to: one that is too low leaves the others their room."""
_MEASURED = (
    "Measured: the most that torch's allocator, weights and pages held together, by the allocator's own mark, and the "
    "most that the driver showed beside them, sampled every 3 ms in a process of its own. Rows run side by side where "
    "the device has room: each counts its own process."
)
_BARS = (
    f"Bars: the total within {_OFF:g} %, never under by more than {-_UNDER:g} %; the rest (all but weights and "
    f"context) within {_REST:g} %. Plans are made for the card by its name, with nothing measured in this run."
)
_PEER = "estimate-memory: accelerate's own functions on the model without weights, in the row's dtype."
_FORETOLD = (
    "Nothing was loaded or measured: what plans say of the largest phase, for the card by its name. A run on that card "
    "takes them with --predicted FILE."
)
_ELSEWHERE = "Predictions without a GPU: made on another machine with --predict-only."
_CAPS = (
    "Caps: what was chosen automatically has to be gone through under the cap; with force, what needs 3 % more than "
    "the cap has to run out of memory, and what needs 1 % less has to be gone through."
)


@dataclass(frozen=True)
class Outcome:
    """One row: what was said before, and what came of it. Bytes.

    Attributes:
        predicted, rest: the largest phase, and what it has beside weights and context.
        estimate: what accelerate says.
        measured: what the worker told; see `plan_worker.measure`.
    """

    row: Setting
    predicted: int
    rest: int
    estimate: int | None
    measured: Mapping[str, Any]

    @property
    def done(self) -> bool:
        return bool(self.measured["outcome"] == "done")

    @property
    def off(self) -> float:
        """The error of the total in per cent: positive, where too much was predicted."""
        return 100 * (self.predicted / int(self.measured["total"]) - 1)

    @property
    def rest_off(self) -> float:
        """The same of the rest."""
        return 100 * (self.rest / max(1, int(self.measured["rest"])) - 1)

    @property
    def meets(self) -> bool | None:
        """Whether the row reaches its bar; None: it was not gone through, or the driver hides the process."""
        budget = self.row.policy.budget
        if self.row.expected is False:
            return bool(self.measured["outcome"] == "out of memory")
        if self.row.expected is True:
            return self.done and (budget is None or self.measured["process"] <= budget)
        if not self.done or self.measured["hidden"]:
            return False if not self.done else None
        return abs(self.off) <= _OFF and self.off >= _UNDER and abs(self.rest_off) <= _REST

    def figure(self, judge: Callable[[bool], bool | None]) -> Figure:
        """The row of the report."""
        total = self.measured["total"] if self.done else None
        if self.row.expected is None:
            told = f"{self.off:+.2f} %, rest {self.rest_off:+.2f} %" if self.done else str(self.measured["outcome"])
        else:
            told = f"{self.measured['outcome']}, {'to be done' if self.row.expected else 'to run out of memory'}"
        peers = {"measured": total, "estimate-memory": self.estimate}
        meets = None if self.meets is None else judge(self.meets)
        return Figure(self.row.name, "B", self.predicted, peers, bar=told, meets=meets)

    def to_dict(self) -> dict[str, Any]:
        errors = {"off": self.off, "rest_off": self.rest_off} if self.done else {}
        return {
            "row": self.row.to_dict(),
            "predicted": self.predicted,
            "predicted_rest": self.rest,
            "estimate_memory": self.estimate,
            "meets": self.meets,
            "measured": dict(self.measured),
            **errors,
        }


def run(bench: Bench) -> Report:
    """Every row whose name holds one of the words that were asked for; each is written as soon as it is there."""
    plans = Plans(bench)
    rows = plan_rows.small() if bench.small else (*plan_rows.accuracy(), *caps(plans.planner(PHONE, "auto")))
    rows = tuple(row for row in rows if bench.wants(row.name))
    if bench.predict_only:
        return bench.report("plan, predicted", [_predicted(bench, plans, row) for row in rows], _FORETOLD, _PEER)
    elsewhere = {} if bench.predicted is None else read_predicted(bench.predicted)
    outcomes = list(_outcomes(bench, plans, rows))
    figures = [*(one.figure(bench.judge) for one in outcomes), *_worst(bench, outcomes)]
    notes = [_MEASURED, _BARS, _PEER, _CAPS]
    if elsewhere:
        figures.append(_apart(bench, outcomes, elsewhere))
        notes.append(_ELSEWHERE)
    return bench.report("plan", figures, *notes)


def read_predicted(file: Path) -> dict[str, int]:
    """Predictions by the name of their row, from a report that ``--predict-only --json`` wrote.

    Raises:
        LabError: it is no such report.
    """
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))["reports"]["plan"]["figures"]
        return {str(one["name"]): int(one["ours"]) for one in figures}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabError(
            f"{file} holds no predictions ({type(error).__name__}): autoglm-lab bench plan --predict-only --json FILE "
            "writes them"
        ) from None


def _predicted(bench: Bench, plans: Plans, row: Setting) -> Figure:
    plan, estimate = plans.of(row)
    nbytes = _largest(plan).nbytes
    bench.keep({"row": row.to_dict(), "predicted": nbytes, "estimate_memory": estimate})
    bench.say(row.name)
    return Figure(row.name, "B", nbytes, {"estimate-memory": estimate})


def _apart(bench: Bench, outcomes: Sequence[Outcome], elsewhere: Mapping[str, int]) -> Figure:
    """The largest difference between what was predicted here and there."""
    shares = [100 * (one.predicted / elsewhere[one.row.name] - 1) for one in outcomes if one.row.name in elsewhere]
    most = max(shares, key=abs, default=None)
    meets = None if most is None else bench.judge(abs(most) <= _APART)
    name = f"largest difference from {len(shares)} predictions made without a GPU"
    return Figure(name, "%", most, bar=f"within {_APART:g} %", meets=meets)


def caps(phone: Planner) -> tuple[Setting, ...]:
    """Budgets for the phone model: chosen automatically, and just above and below what a plan says is needed."""
    step = Setting("", PHONE, 2000, 128, 1, (644, 1484), auto=True, expected=True)
    rows = [
        replace(step, name=f"cap, auto on {size} GiB: the phone step", settings={"budget": size * GiB})
        for size in (24, 16, 12, 8)
    ]
    kinds: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("keys and values", 22, {}),
        ("KV in int8", 21, {"precision": "int8"}),
        ("chunks of 8,192", 22, {"chunk": 8192}),
    )
    for words, size, kv in kinds:
        policy = MemoryPolicy(budget=size * GiB, kv=kv)
        for share, fits in ((_BELOW, True), (_ABOVE, False)):
            context = landing(phone, policy, round(share * size * GiB), above=not fits)
            if context is not None:
                name = f"cap, {size} GiB, {words}: {'1 % below' if fits else '3 % above'} at {context:,} tokens"
                settings = {"budget": size * GiB, "kv": kv}
                rows.append(Setting(name, PHONE, context, 8, settings=settings, force=True, expected=fits))
    return tuple(rows)


def landing(planner: Planner, policy: MemoryPolicy, target: int, *, above: bool) -> int | None:
    """The longest prompt that needs at most ``target`` bytes, or the shortest that needs more; None: there is none."""
    low, high = 256, 65_000

    def over(context: int) -> bool:
        return planner.plan(policy, Workload(context, 8), search=False).largest.needed > target

    if over(low) or not over(high):
        return None
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (low, middle) if over(middle) else (middle, high)
    return high if above else low


class Plans:
    """Plans of the rows, for the device by its name."""

    def __init__(self, bench: Bench) -> None:
        self._where = _where(bench)
        self._planners: dict[tuple[str, str, bool], Planner] = {}
        self._estimates: dict[tuple[str, str, bool], int | None] = {}

    def planner(self, model: str, dtype: str, *, small: bool = False) -> Planner:
        key = model, dtype, small
        if key not in self._planners:
            shapes = shapes_of(model, dtype, self._where.kind, small=small)
            self._estimates[key] = estimate_memory(shapes)
            self._planners[key] = planner(shapes, self._where)
        return self._planners[key]

    def of(self, row: Setting) -> tuple[Plan, int | None]:
        """The plan of a row, and what accelerate says of its model."""
        predict = self.planner(row.model, row.dtype, small=row.small)
        plan = predict.plan(row.policy, row.workload, search=False)
        if row.auto:
            plan = choose(predict, row.policy, row.workload).plan
        return plan, self._estimates[row.model, row.dtype, row.small]


def shapes_of(model: str, dtype: str, kind: str, *, small: bool) -> Outline:
    """A row's model without weights."""
    given = source(model, small=small)
    shapes = outline(given, device=kind)
    if not isinstance(given, str):
        shapes = replace(shapes, processor=lambda: made_up_processor(given))
    if dtype != "auto":
        asked: torch.dtype = getattr(torch, dtype)
        shapes = replace(shapes, model=skeleton(shapes.model.config, asked), dtype=asked)
    return shapes


def estimate_memory(shapes: Outline) -> int | None:
    """What ``accelerate estimate-memory`` shows as total size; None: accelerate is not installed."""
    try:
        from accelerate.utils import calculate_maximum_sizes
    except ImportError:
        return None
    total, _ = calculate_maximum_sizes(shapes.model)
    return int(total)


def _where(bench: Bench) -> PlanDevice:
    if not bench.cuda:
        return plan_device("cpu" if bench.small else "H200", None, None)
    return plan_device(card_or_device(bench.device), None, None)


class _Room:
    """Bytes of the device that rows which run side by side share; on a CPU they run one after the other."""

    def __init__(self, nbytes: int) -> None:
        self._left, self._whole = nbytes, nbytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Wait for so many bytes, or for all of them where there are fewer."""
        nbytes = min(nbytes, self._whole)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= nbytes)
            self._left -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._left += nbytes
                self._changed.notify_all()


def _outcomes(bench: Bench, plans: Plans, rows: Sequence[Setting]) -> list[Outcome]:
    free = torch.cuda.mem_get_info(bench.device)[0] if bench.cuda else 0
    room, at_once = _Room(int(_SHARED * free)), _AT_ONCE if bench.cuda else 1

    def measured(row: Setting, nbytes: int) -> dict[str, Any]:
        with room.take(nbytes):
            return _measured(row)

    found, under_way = [], []
    with ThreadPoolExecutor(at_once) as workers:
        for row in rows:  # a row is measured while the next ones are planned
            plan, estimate = plans.of(row)
            largest = _largest(plan)
            future = workers.submit(measured, row, largest.nbytes)
            under_way.append((row, largest, estimate, future))
        for row, largest, estimate, future in under_way:
            rest = largest.nbytes - sum(largest.of_kind(kind) for kind in ("weights", "context", "unattributed"))
            outcome = Outcome(row, largest.nbytes, rest, estimate, future.result())
            found.append(outcome)
            bench.keep(outcome.to_dict())
            bench.say(
                f"{row.name}: {outcome.measured['outcome']}" + (f", {outcome.off:+.2f} %" if outcome.done else "")
            )
    return found


def _largest(plan: Plan) -> PhasePlan:
    return max(plan.phases, key=lambda phase: phase.nbytes)


def _measured(row: Setting) -> dict[str, Any]:
    """What the row's own process tells."""
    missing = {"name": row.name, "outcome": "failed", "total": 0, "rest": 0, "process": 0, "hidden": False}
    told = fresh("autoglm_lab.bench.plan_worker:measured", _PATIENCE, row=row.to_dict())
    return missing | {"why": told["error"]} if "error" in told else told


def _worst(bench: Bench, outcomes: Sequence[Outcome]) -> list[Figure]:
    told = [one for one in outcomes if one.row.expected is None and one.done and not one.measured["hidden"]]
    if not told:
        return []
    off, rest = max((one.off for one in told), key=abs), max((one.rest_off for one in told), key=abs)
    least = min(one.off for one in told)
    return [
        Figure("largest error of a total", "%", off, bar=f"within {_OFF:g} %", meets=bench.judge(abs(off) <= _OFF)),
        Figure("most under", "%", least, bar=f">= {_UNDER:g} %", meets=bench.judge(least >= _UNDER)),
        Figure(
            "largest error of the rest", "%", rest, bar=f"within {_REST:g} %", meets=bench.judge(abs(rest) <= _REST)
        ),
    ]
