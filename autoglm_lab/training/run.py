"""A training under way, as a person holds it: how far it is, its losses, stopping it, and what came of it."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autoglm_lab.errors import TrainingError
from autoglm_lab.memory.peak import PhasePeaks
from autoglm_lab.units import format_bytes, format_seconds

RunState = Literal["waiting", "preparing", "training", "done", "stopped", "failed"]


@dataclass(frozen=True, repr=False)
class TrainingResult:
    """What came of a training.

    Attributes:
        steps: done, all sessions of a resumed one together.
        loss: mean of the last tenth of the steps.
        seconds: of the steps, without the preparation.
        peaks: of the phases, as of an answer's; where the machine tells.
        activations: most bytes of a micro-batch beyond what stood when it began, by ``forward`` and ``backward``; the
            backward pass has the gradients that came with it.
        moved: bytes of activations that went to the host.
        settings: how the last step spent memory.
        checkpoint: folder to resume from; None where none was written.
        stopped: ended before its last step.
    """

    steps: int
    loss: float
    seconds: float
    peaks: PhasePeaks
    activations: dict[str, int]
    moved: int
    settings: str
    checkpoint: Path | None
    stopped: bool

    def __repr__(self) -> str:
        passes = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in self.activations.items())
        said = f"{'stopped' if self.stopped else 'done'} after {self.steps} steps, {format_seconds(self.seconds)}"
        return f"{said}: loss {self.loss:.3f}, most {passes or 'not told'} ({self.settings})"


@dataclass(eq=False, repr=False)
class TrainingRun:
    """A training on the engine's thread. Reading it never waits.

    Attributes:
        name: of the adapter, or of the modules that learn.
        steps: in all.
        step: done.
        losses: of each step, ``(step, loss)``.
        note: what it is doing, or what it had to change.
        problems: lines of the data that were left out.
        activations: as in `TrainingResult`, so far.
        began: when the steps began; before that, when the training was asked for. In seconds of a monotonic clock.
        seconds: of the steps so far.
        tokens: that these steps read.
    """

    name: str
    steps: int
    step: int = 0
    state: RunState = "waiting"
    note: str = ""
    losses: list[tuple[int, float]] = field(default_factory=list)
    problems: tuple[str, ...] = ()
    peaks: PhasePeaks = field(default_factory=PhasePeaks)
    activations: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    tokens: int = 0
    _future: Future[Any] | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _watchers: list[Callable[[TrainingRun], None]] = field(default_factory=list)

    def bind(self, future: Future[Any]) -> None:
        """What says that it has ended."""
        self._future = future

    def stop(self) -> None:
        """End after the step under way; a checkpoint is written. Returns at once."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    @property
    def loss(self) -> float | None:
        """Mean over the last tenth of the steps so far."""
        last = [loss for _, loss in self.losses[-max(1, len(self.losses) // 10) :]]
        return sum(last) / len(last) if last else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that went forward and backward in a second; None before the first step."""
        return self.tokens / self.seconds if self.seconds else None

    def result(self, timeout: float | None = None) -> TrainingResult:
        """Wait until it ends.

        Raises:
            OutOfMemoryError: a step did not fit, however it was cut; model and adapters are as before.
            TimeoutError: it still runs.
        """
        if self._future is None:
            raise TrainingError("this training was never begun")
        made: TrainingResult = self._future.result(timeout)
        return made

    def __await__(self) -> Any:
        import asyncio

        assert self._future is not None
        return asyncio.wrap_future(self._future).__await__()

    def on_change(self, watcher: Callable[[TrainingRun], None]) -> None:
        """Call ``watcher`` after each step and change of state, on the engine's thread: it must not wait."""
        self._watchers.append(watcher)

    def tell(self, state: RunState | None = None, note: str | None = None) -> None:
        """For the engine's thread: something changed."""
        self.state = state or self.state
        self.note = self.note if note is None else note
        for watcher in tuple(self._watchers):
            watcher(self)

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        note = f" ({self.note})" if self.note else ""
        left = f"\n{len(self.problems)} line(s) of the data left out: {self.problems[0]}" if self.problems else ""
        return f"training '{self.name}': {self.state}, step {self.step} of {self.steps}{loss}{note}{left}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>{curve(self.losses)}"


def curve(losses: list[tuple[int, float]], width: int = 360, height: int = 90) -> str:
    """The losses as an SVG, for where no JavaScript runs."""
    if len(losses) < 2:
        return ""
    low, high = min(loss for _, loss in losses), max(loss for _, loss in losses)
    first, last = losses[0][0], losses[-1][0]
    points = " ".join(
        f"{(step - first) / max(last - first, 1) * (width - 8) + 4:.1f},"
        f"{height - 4 - (loss - low) / max(high - low, 1e-9) * (height - 8):.1f}"
        for step, loss in losses
    )
    title = f"loss from {losses[0][1]:.3f} to {losses[-1][1]:.3f} over {last - first + 1} steps"
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{title}"><title>{title}</title>'
        f'<polyline points="{points}" fill="none" stroke="#2a78d6" stroke-width="1.5"/></svg>'
    )
