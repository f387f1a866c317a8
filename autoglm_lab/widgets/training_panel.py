"""Fine-tuning: the training under way or the last one, the adapters that came of it, and how training spends memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from autoglm_lab.errors import LabError
from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.settings import set_policy
from autoglm_lab.widgets.snapshot import Snapshot

CURVE_POINTS: Final = 200
PHASES: Final = ("encode", "forward", "backward")
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
    }


def run_state(run: Any) -> dict[str, Any]:
    """How far a `training.run.TrainingRun` is: plain values, read while it goes on.

    ``left`` is what it will still take, in seconds, where that can be told; peaks are bytes beyond what stood before.
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
        "peaks": {phase: run.peaks.work[phase] for phase in PHASES if phase in run.peaks.work},
        "problems": list(run.problems[:10]),
        "left_out": len(run.problems),
    }


def thinned(losses: Sequence[tuple[int, float]], most: int = CURVE_POINTS) -> list[list[float | None]]:
    """At most ``most`` points ``[step, loss]``: the last step and the mean loss of as many steps each.

    A loss that is not finite is None: the line has a gap there.
    """
    size = max(1, -(-len(losses) // most))
    groups = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [[group[-1][0], _finite(math.fsum(loss for _, loss in group) / len(group))] for group in groups]


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
    """The run with its curve, stop and resume; adapters on and off, merged, removed, saved; `TrainingPolicy`."""

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
