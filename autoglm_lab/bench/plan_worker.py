"""Measures one row of the plan's bench, in a process that does nothing else; see `bench.fresh`."""

from __future__ import annotations

import threading
from typing import Any

from autoglm_lab.bench.plan_rows import RANK, Setting
from autoglm_lab.bench.prompts import length, said, screen, text_of, user
from autoglm_lab.errors import LabError, LoadError, OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator, open_accelerator
from autoglm_lab.memory.allocator_setting import expand_segments
from autoglm_lab.memory.high_water import Watch, high_water
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.workbench import Workbench

_EVERY = 0.003
_PATIENCE = 300
_STEPS = 2
"""Of fine-tuning: the optimiser's states come with the first."""


class Watcher:
    """Samples what the process holds, in a thread of its own. Bytes.

    What torch's allocator reserved between two samples is counted too, however short it was. While the model comes only
    `process` is looked at: nobody answers for the weights yet.

    Attributes:
        held: the most in torch's allocator, weights and pages together.
        rest: the most of that beside weights, once the model is loaded.
        weights: the most of that in weights.
        driver: the most that the driver showed beside them.
        process: the most that the process held.
        accelerator: whose counters are read.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.held = self.rest = self.weights = self.driver = self.process = 0
        self.hidden = False
        self._bench: Workbench | None = None
        self._since: Watch | None = None
        self._driver = 0
        self.accelerator = accelerator
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def watch(self, bench: Workbench) -> None:
        """From now on by the workbench's own counters."""
        self.accelerator, self._bench = bench.engine.state.accelerator, bench
        self.look()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self.look()

    def look(self) -> None:
        """One sample; those that straddle a change are left out."""
        bench, accelerator = self._bench, self.accelerator
        before = accelerator.counters()
        process = accelerator.reading().process
        weights = 0 if bench is None else self._weights(bench)
        after = accelerator.counters()
        if before != after or after.moving:
            return
        self.hidden |= process is None
        self.process = max(self.process, process or 0)
        if bench is None:
            return
        held = after.reserved + after.slabs
        most = self._most(held)
        self.held, self.weights = max(self.held, most), max(self.weights, weights)
        self.rest = max(self.rest, most - weights)
        if process is not None:
            # The driver hands a block out before the allocator counts it: what is there in two samples is the driver's.
            driver, self._driver = min(self._driver, process - held), process - held
            self.driver = max(self.driver, driver)

    def _most(self, held: int) -> int:
        """The most that was held since the last sample."""
        if self.accelerator.kind != "cuda":
            return held
        marks, most = high_water(self.accelerator.device), held
        if self._since is not None:
            most = marks.close(self._since, held).process or held
        self._since = marks.open()
        return most

    @staticmethod
    def _weights(bench: Workbench) -> int:
        rows = bench.engine.state.residency.holdings()
        return sum(row.nbytes or 0 for row in rows if row.kind == "weights" and row.place == "device")

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY):
            self.look()


def measure(row: Setting) -> dict[str, Any]:
    """Load the row's model, let it answer, and tell what was held; ``outcome``: ``done``, ``out of memory`` …"""
    policy = row.policy
    if policy.reclaim.expandable_segments:
        expand_segments()
    accelerator = open_accelerator()
    watcher = Watcher(accelerator)
    told: dict[str, Any] = {"name": row.name, "device": accelerator.name, "outcome": "done", "phases": {}}
    try:
        with opened(row, policy, accelerator) as bench:
            watcher.watch(bench)
            told["policy"] = bench.policy.to_dict()
            told["phases"] = _learn(bench, row) if row.train else _ask(bench, row)
            watcher.stop()
    except OutOfMemoryError as error:
        told |= {"outcome": "out of memory", "why": str(error)}
    except LoadError as error:
        told |= {"outcome": "nothing fits" if row.auto else "failed", "why": str(error)}
    except LabError as error:
        told |= {"outcome": "failed", "why": f"{type(error).__name__}: {error}"}
    if accelerator.kind == "cpu":  # nothing is held apart from the process, and its peaks are the kernel's
        peak = max([watcher.process, *told["phases"].values()])
        total, rest = peak, max(0, peak - watcher.accelerator.context - watcher.weights)
    else:
        total, rest = max(watcher.process, watcher.held + watcher.driver), watcher.rest
    return told | {
        "total": total,
        "rest": rest,
        "driver": watcher.driver,
        "process": watcher.process,
        "hidden": watcher.hidden,
        "context": watcher.accelerator.context,
        "grown": watcher.accelerator.grown.parts,
    }


def opened(row: Setting, policy: MemoryPolicy, accelerator: Accelerator) -> Workbench:
    """The row's model with made-up weights; the embedded one with its own."""
    from autoglm_lab.bench.plan_models import FAMILIES, made_up_processor, source
    from autoglm_lab.models.loading import resolve
    from autoglm_lab.opening import load

    weights = None if row.model == "autoglm-tiny" else "dummy"
    if row.model not in FAMILIES:
        given: Any = "auto" if row.auto else policy
        budget = policy.budget if row.auto else None
        bench = load(row.model, policy=given, budget=budget, workload=row.workload, weights=weights, dtype=row.dtype)
        if row.auto:
            bench.policy = bench.policy.replace(
                reclaim=policy.reclaim.model_dump(), generation=policy.generation.model_dump()
            )
        return bench
    config: Any = source(row.model, small=row.small)
    resolved = resolve(config, weights=weights, dtype=row.dtype, device=accelerator.device)
    resolved.processor = made_up_processor(config)
    return Workbench(resolved, policy, accelerator)


def _learn(bench: Workbench, row: Setting) -> dict[str, int]:
    """A few steps of fine-tuning on dialogues of as many tokens, most of them learnt; the watcher sees the peak."""
    count = bench.policy.training.micro_batch
    around = length(bench, [user("x"), said("assistant", "x")]) - 1
    answers = [text_of(bench, max(1, row.context - around), seed) for seed in range(count)]
    data = [{"messages": [said("user", "x"), said("assistant", answer)]} for answer in answers]
    bench.finetune(data, rank=RANK, steps=_STEPS, learning_rate=1e-6).result(_PATIENCE)
    return {}


def _ask(bench: Workbench, row: Setting) -> dict[str, int]:
    """One turn in each conversation, all at the same time. Returns the peaks of the phases."""
    images = [screen(seed, *row.image_size) for seed in range(row.images)]
    around = length(bench, [user("x", *images)]) - 1
    turns = [
        bench.engine.submit(
            [user(text_of(bench, max(1, row.context - around), seed), *images)],
            conversation=f"row {seed}",
            force=row.force or row.expected is None,
        )
        for seed in range(row.conversations)
    ]
    phases: dict[str, int] = {}
    for turn in turns:
        for phase, nbytes in turn.result(_PATIENCE).peak_bytes.items():
            phases[phase] = max(nbytes, phases.get(phase, 0))
    return phases


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """`measure` as `bench.fresh` calls it."""
    return measure(Setting.from_dict(row))
