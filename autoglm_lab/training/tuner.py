"""What a workbench can do about learning: begin a training, and switch, merge, save and load what was learnt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoglm_lab.engine.commands import NAME
from autoglm_lab.engine.local import LocalEngine
from autoglm_lab.errors import TrainingError
from autoglm_lab.memory.ledger import LedgerBook
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.training.adapters import Adapters
from autoglm_lab.training.course import Course
from autoglm_lab.training.dataset import Dataset, read_dataset
from autoglm_lab.training.finetune import Finetuning, forget_answers
from autoglm_lab.training.loop import latest
from autoglm_lab.training.run import TrainingRun


class Tuner:
    """Training and adapters of one workbench. Its methods may be called from any thread.

    Attributes:
        run: the training under way, or the last one; None before the first.
    """

    def __init__(
        self,
        engine: LocalEngine,
        book: LedgerBook,
        recompute: Callable[[TrainingLoad], frozenset[int] | None] | None = None,
    ) -> None:
        self._engine, self._book, self._recompute = engine, book, recompute
        self._adapters = Adapters(engine.state.model)
        book.register(self._adapters)
        self.run: TrainingRun | None = None
        self._last: tuple[Dataset, Course] | None = None

    def begin(
        self,
        data: Dataset | str | Path | Iterable[Mapping[str, Any]],
        course: Course,
        *,
        strict: bool = False,
        watch: Callable[[TrainingRun], None] | None = None,
    ) -> TrainingRun:
        """Begin a training; returns at once. It waits until no turn is under way, and turns wait until it is over.

        Args:
            strict: a bad line of the data is an error.
            watch: called after each step and change of state, on the engine's thread: it must not wait.

        Raises:
            DatasetError: the data cannot be read; with ``strict`` also for one bad line.
            TrainingError: another training has the model, or there is no processor, or a setting cannot be.
        """
        if self.run is not None and not self.run.ended:
            raise TrainingError("the model is being trained already: wait for that run, or stop() it")
        if self._engine.state.processor is None:
            raise TrainingError(
                "this model came without a tokenizer: attach one with it, or load a folder that has one"
            )
        dataset = data if isinstance(data, Dataset) else read_dataset(data, strict=strict)
        tuning = Finetuning(
            self._engine.state,
            self._adapters,
            dataset,
            course,
            register=self._book.register,
            unregister=self._book.unregister,
            recompute=self._recompute,
        )
        if watch is not None:
            tuning.run.on_change(watch)
        tuning.run.bind(self._engine.occupy(tuning.job))
        self.run, self._last = tuning.run, (dataset, course)
        return tuning.run

    @property
    def resumable(self) -> bool:
        """Whether `resume` can go on: the last training ended before its last step and left a whole checkpoint."""
        run, last = self.run, self._last
        if run is None or last is None or run.state not in ("stopped", "failed"):
            return False
        out = last[1].out
        return out is not None and latest(out) is not None

    def resume(self, *, watch: Callable[[TrainingRun], None] | None = None) -> TrainingRun:
        """Go on with the last training from its last whole checkpoint; returns at once.

        Raises:
            TrainingError: there is none to go on with.
        """
        last = self._last
        if last is None or not self.resumable:
            raise TrainingError(
                "there is no training to resume: it takes one that was stopped, or failed, and wrote checkpoints (out=)"
            )
        data, course = last
        return self.begin(data, replace(course, resume=True), watch=watch)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters on the model."""
        return self._adapters.names

    @property
    def on(self) -> bool:
        """Whether the model answers with its adapters."""
        return self._adapters.on

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters on the device."""
        return self._adapters.nbytes

    def switch(self, *, on: bool) -> None:
        """Let the model answer with its adapters, or as it was before. What was said is read again."""
        self._change(lambda: self._adapters.switch(on=on), f"adapters {'on' if on else 'off'}")

    def merge(self) -> None:
        """Make the adapters part of the weights, for good: they cost no memory and no time any more.

        In a low precision the sum is rounded to the weights' dtype.
        """
        if not self._adapters.names:
            raise TrainingError("there is no adapter to merge: train one, or load one")
        self._last = None  # resumed, what was learnt would be there twice
        self._change(self._adapters.merge, "adapters merged")

    def remove(self) -> None:
        """Take the adapters off; the model is as before."""
        self._change(self._adapters.remove, "adapters removed")

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Write an adapter, as peft reads it; see `Adapters.save`."""
        made: Path = self._alone(lambda: self._adapters.save(folder, name))
        return made

    def load(self, folder: str | Path, name: str = "default") -> None:
        """Put a saved adapter on the model and answer with it.

        Raises:
            TrainingError: it is none, or one of another model.
        """
        self._change(lambda: self._adapters.load(folder, name), f"adapter '{name}' loaded")

    def _change(self, act: Callable[[], object], why: str) -> None:
        def run() -> None:
            act()
            forget_answers(self._engine.state, why)
            self._engine.state.prepare_steps()
            self._engine.state.event("note", "adapters", nbytes=self._adapters.nbytes, why=why)

        self._alone(run)

    def _alone(self, act: Callable[[], Any]) -> Any:
        """On the engine's thread, while no turn is under way."""
        if threading.current_thread().name == NAME:
            return act()
        return self._engine.occupy(lambda _between: act()).result()
