"""A long job that has the model to itself, on the engine's thread: a training. Turns wait until it is over."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from autoglm_lab.engine.commands import Commands
from autoglm_lab.engine.turn_queue import TurnQueue
from autoglm_lab.errors import TrainingError

Job = Callable[[Callable[[], bool]], Any]


class Occupation:
    """Runs one job at a time between turns, and what is asked of the engine between the job's steps.

    Args:
        commands: of the engine's thread.
        turns: a job begins when none is under way.
    """

    def __init__(self, commands: Commands, turns: TurnQueue) -> None:
        self._commands, self._turns = commands, turns
        self._waiting: tuple[Job, Future[Any]] | None = None
        self.running = False

    @property
    def any(self) -> bool:
        """Whether a job waits to begin."""
        return self._waiting is not None

    def ask(self, job: Job) -> Future[Any]:
        """Begin ``job`` once no turn is under way. It is given a function to call between its steps.

        Raises:
            TrainingError: another job has the model.
        """
        if self.running or self._waiting is not None:
            raise TrainingError("the model is being trained already: wait for that run, or stop() it")
        self._waiting = (job, Future())
        return self._waiting[1]

    def begin(self) -> None:
        """Run the job that waits, to its end, if no turn is under way. For the engine's thread."""
        if self._waiting is None or self._turns.under_way:
            return
        (job, future), self._waiting, self.running = self._waiting, None, True
        try:
            future.set_result(job(self._between))
        except BaseException as error:  # noqa: BLE001 - whoever waits for the job gets it
            future.set_exception(error)
        finally:
            self.running = False

    def refuse(self, error: Exception) -> None:
        """Let the job that waits never begin."""
        if self._waiting is not None:
            self._waiting[1].set_exception(error)
            self._waiting = None

    def _between(self) -> bool:
        """Do what was asked meanwhile. False: the engine is being closed, and the job must end."""
        while taken := self._commands.take():
            pass
        if taken is None:
            return False
        self._turns.withdraw_cancelled()
        return True
