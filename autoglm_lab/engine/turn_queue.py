"""The turns of one engine: those that wait, and those under way, which go on together, a token each a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.recovery import recovering
from autoglm_lab.engine.state import EngineState
from autoglm_lab.engine.turn_run import Steps, TurnRun


@dataclass(frozen=True)
class _Active:
    """A turn under way and its token that is to be read next."""

    run: TurnRun
    steps: Steps
    token: int


class TurnQueue:
    """Turns of different conversations go on side by side; those of one conversation, one after the other.

    Only the engine's thread calls it.

    Args:
        ended: called after each turn that ran has ended.
    """

    def __init__(self, state: EngineState, ended: Callable[[], None]) -> None:
        self._state, self._ended = state, ended
        self._waiting: list[TurnRun] = []
        self._active: list[_Active] = []

    @property
    def any(self) -> bool:
        """Whether a turn waits or is under way."""
        return bool(self._active or self._waiting)

    @property
    def under_way(self) -> bool:
        """Whether a turn has begun and not ended."""
        return bool(self._active)

    def withdraw_cancelled(self) -> None:
        """Let waiting turns that were cancelled end, beginning none."""
        for run in tuple(self._waiting):
            if run.cancelled:
                self._waiting.remove(run)
                run.withdraw()

    def add(self, run: TurnRun) -> None:
        self._waiting.append(run)

    def cancel(self) -> None:
        """Cancel every turn; each ends in its next round."""
        for run in (*self._waiting, *(active.run for active in self._active)):
            run.cancelled = True

    def round(self) -> None:
        """Begin one turn that can begin, then read one token of every turn under way."""
        self._begin_one()
        if self._active:
            active, self._active = self._active, []
            self._decode(active)

    def _begin_one(self) -> None:
        for run in tuple(self._waiting):
            if run.cancelled:
                self._waiting.remove(run)
                run.withdraw()
            elif not run.conversation.busy:
                self._waiting.remove(run)
                run.conversation.busy = True
                steps = run.steps()
                self._advance(run, steps, partial(next, steps))
                return

    def _advance(self, run: TurnRun, steps: Steps, step: Callable[[], int]) -> None:
        """Let a turn go on until it has a token to be read, or has ended."""
        try:
            self._active.append(_Active(run, steps, step()))
        except StopIteration:
            self._ended()

    def _decode(self, active: Sequence[_Active]) -> None:
        """Read a token of every turn, in one batch; where that fails for all together, one by one."""
        state = self._state
        state.enter("decode", *(one.run.peaks for one in active))
        state.in_use = frozenset(name for name in state.residency if name not in ("vision", "audio"))
        own = active[0].run.conversation if len(active) == 1 else None
        kvs, tokens = [one.run.conversation.kv for one in active], [one.token for one in active]
        failure: Exception | None = None
        try:
            logits = recovering(state, "decode", own, lambda: self._step(kvs, tokens))
        except Exception as error:  # noqa: BLE001 - it belongs to the turns
            failure = error.with_traceback(None)
        if failure is None:
            for one, after in zip(active, logits, strict=True):
                self._advance(one.run, one.steps, partial(one.steps.send, after))
        elif len(active) > 1:
            for one in active:
                self._decode([one])
        else:
            self._advance(active[0].run, active[0].steps, partial(active[0].steps.throw, failure))

    def _step(self, kvs: Sequence[KvState], tokens: Sequence[int]) -> list[Tensor]:
        # What was parked between two steps is woken here: a replayed graph calls no module that could ask for it.
        self._state.residency.ensure(self._state.in_use, "an answer under way")
        with self._state.growth("first decode steps", times=3):
            return self._state.stepper.decode(kvs, tokens)
