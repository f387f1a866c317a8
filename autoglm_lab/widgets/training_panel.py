"""Fine-tuning: the training under way or the last one, the adapters that came of it, and how training spends memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from autoglm_lab.errors import LabError
from autoglm_lab.units import format_bytes
from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.settings import set_policy
from autoglm_lab.widgets.snapshot import Snapshot

CURVE_POINTS: Final = 200
_ENDED = ("done", "stopped", "failed")
_LANE = "training"


def training_state(bench: Any, snapshot: Snapshot) -> dict[str, Any]:
    """The run, the adapters and the settings; ``hidden`` alone for a workbench that cannot train.

    Args:
        bench: a `Workbench`, which imports nothing of training before its first training or adapter.
    """
    if not hasattr(type(bench), "tuner"):
        return {"hidden": True}
    run, names = bench.training, bench.adapters
    tuner: Any = bench.tuner if run is not None or names else None
    shown = None if run is None else run_state(run)
    under_way = shown is not None and not shown["ended"]
    return {
        "run": shown and shown | {"resumable": shown["ended"] and tuner.resumable},
        "adapters": list(names),
        "on": tuner is None or tuner.on,
        "nbytes": snapshot.ledger.nbytes("adapters") if names else 0,
        "active": under_way or bool(names) or (shown is not None and shown["state"] != "done"),
        "settings": snapshot.policy.training.model_dump(),
        "budget": "" if snapshot.policy.budget is None else format_bytes(snapshot.policy.budget),
    }


def run_state(run: Any) -> dict[str, Any]:
    """How far a `training.run.TrainingRun` is: plain values, read while it goes on.

    ``left`` is what it will still take, in seconds, where that can be told; peaks are `peaks_of`.
    """
    losses = list(run.losses)
    rest, state = run.steps - run.step, run.state
    return {
        "name": run.name,
        "state": state,
        "ended": state in _ENDED,
        "stopping": run.stopping,
        "step": run.step,
        "steps": run.steps,
        "note": run.note,
        "loss": _finite(run.loss),
        "curve": thinned(losses),
        "seconds": round(run.seconds, 1),
        "left": round(run.seconds / len(losses) * rest) if losses and state == "training" else None,
        "rate": run.tokens_per_second and round(run.tokens_per_second),
        "peaks": peaks_of(run),
        "problems": list(run.problems[:10]),
        "left_out": len(run.problems),
    }


def peaks_of(run: Any) -> dict[str, int]:
    """Most bytes: of encoding beyond what stood before it, of either pass beyond what stood before its micro-batch."""
    encoded = run.peaks.work.get("encode")
    return ({} if encoded is None else {"encode": encoded}) | dict(run.activations)


def thinned(losses: Sequence[tuple[int, float]], most: int = CURVE_POINTS) -> list[list[float | None]]:
    """At most ``most`` points ``[step, loss]``: the last step and the mean loss of as many steps each.

    A loss that is not finite is None: the line has a gap there.
    """
    size = max(1, -(-len(losses) // most))
    groups = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [[group[-1][0], _finite(math.fsum(loss for _, loss in group) / len(group))] for group in groups]


def begin_training(bench: Any, asked: Mapping[str, Any]) -> None:
    """Begin a training with what was typed; what was left empty is as it would be without.

    Args:
        asked: ``data``: a JSONL file, seen from where the kernel runs; ``method``, ``rank``, ``epochs``, ``out`` as
            `Workbench.finetune` takes them; ``budget``: what the policy's becomes.

    Raises:
        LabError: no file is named.
        DatasetError: it cannot be learnt from; the message names the line.
        PolicyError, TrainingError: a value cannot be.
    """
    typed = {name: str(value).strip() for name, value in asked.items()}
    if not typed.get("data"):
        raise LabError('name a file to learn from: JSON lines, one dialogue {"messages": […]} a line')
    numbers = {"rank": int, "epochs": float}
    settings: dict[str, Any] = {}
    for name, kind in numbers.items():
        if typed.get(name):
            try:
                settings[name] = kind(typed[name])
            except ValueError:
                raise LabError(f"{name} is a number (got {typed[name]!r})") from None
    if typed.get("out"):
        settings["out"] = Path(typed["out"]).expanduser()
    if "budget" in typed:
        set_policy(bench, budget=typed["budget"] or None)
    bench.finetune(Path(typed["data"]).expanduser(), method=typed.get("method") or "lora", **settings)


def save_adapters(tuner: Any, folder: str) -> str:
    """Write every adapter: one into ``folder``, several into a folder of their name in there.

    Returns:
        Where they are.

    Raises:
        LabError: no folder is named.
        TrainingError: it exists, or there is no adapter.
    """
    if not folder.strip():
        raise LabError("name a folder to save the adapter to, such as adapters/mine")
    whole = Path(folder.strip()).expanduser()
    names = tuner.adapters
    for name in names if len(names) > 1 else [None]:
        tuner.save(whole / name if name else whole, name)
    return str(whole.resolve())


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


class TrainingPanel(Panel):
    """Begin a run; its curve, stop and resume; adapters on and off, merged, removed, saved; `TrainingPolicy`."""

    name = "training_panel"

    _saved = ""

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        state = training_state(None if self.host is None else self.host.bench, snapshot)
        if not state.get("adapters"):
            self._saved = ""
        return state if state.get("hidden") else state | {"saved": self._saved}

    def do_set(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Change one setting of the policy's ``training`` part: the next training obeys it."""
        if self.host is not None:
            bench, setting, value = self.host.bench, str(content["setting"]), content["value"]
            self.run(setting, lambda: set_policy(bench, training={setting: value}))

    def do_begin(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Begin a training with what was typed (`begin_training`)."""
        if self.host is not None:
            bench, asked = self.host.bench, dict(content["asked"])
            self.run("begin", lambda: begin_training(bench, asked), lane=_LANE)

    def do_stop(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """End the training after its step; nothing is waited for."""
        if self.host is not None:
            bench: Any = self.host.bench
            if bench.training is not None:
                bench.training.stop()
            self.host.wake()

    def do_resume(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        self._tune("resume", lambda tuner: tuner.resume())

    def do_switch(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Answer with the adapters, or as before."""
        on = bool(content["on"])
        self._tune("switch", lambda tuner: tuner.switch(on=on))

    def do_merge(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Make the adapters part of the weights. The browser has asked whether that is meant."""
        self._tune("merge", lambda tuner: tuner.merge())

    def do_remove(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        self._tune("remove", lambda tuner: tuner.remove())

    def do_save(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        folder = str(content["folder"])

        def save(tuner: Any) -> None:
            self._saved = ""
            self._saved = save_adapters(tuner, folder)

        self._tune("save", save)

    def _tune(self, key: str, act: Any) -> None:
        """On a worker of its own: what changes adapters waits until no turn and no training is under way."""
        if self.host is not None:
            bench: Any = self.host.bench
            self.run(key, lambda: act(bench.tuner), lane=_LANE)
