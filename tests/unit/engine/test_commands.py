"""Commands for the engine's thread."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from autoglm_lab.engine.commands import Commands
from autoglm_lab.errors import EngineClosedError


class Rounds:
    """A worker that counts its rounds and says when it was asked to finish."""

    def __init__(self, rounds: int = 0) -> None:
        self.left, self.worked = rounds, threading.Event()
        self.finished = False

    @property
    def has_work(self) -> bool:
        return self.left > 0

    def work(self) -> None:
        self.left -= 1
        self.worked.set()

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def served() -> tuple[Commands, Rounds]:
    commands, worker = Commands(), Rounds()
    commands.serve(worker)
    return commands, worker


def test_a_command_gives_its_result_to_who_waits(served: tuple[Commands, Rounds]) -> None:
    commands, _worker = served
    assert commands.call(lambda: 6 * 7) == 42
    assert commands.call(lambda: commands.here) is True
    assert commands.here is False
    commands.close()


def test_an_error_is_its_callers_and_the_thread_goes_on(served: tuple[Commands, Rounds]) -> None:
    commands, _worker = served
    with pytest.raises(ZeroDivisionError):
        commands.call(lambda: 1 // 0)
    assert commands.call(lambda: "still here") == "still here"
    commands.close()


def test_a_command_may_give_another(served: tuple[Commands, Rounds]) -> None:
    commands, _worker = served
    assert commands.call(lambda: commands.call(lambda: "inner")) == "inner"
    commands.close()


def test_rounds_of_work_come_between_commands() -> None:
    commands, worker = Commands(), Rounds(3)
    commands.serve(worker)
    assert worker.worked.wait(20)
    commands.close()
    assert worker.finished


def test_after_the_end_nothing_is_taken(served: tuple[Commands, Rounds]) -> None:
    commands, worker = served
    before = commands.post(lambda: "before")
    assert commands.close() is True
    assert before.result(20) == "before"
    assert worker.finished
    assert commands.close() is False
    with pytest.raises(EngineClosedError):
        commands.post(lambda: None)
    assert commands.take() is None
    assert commands.take() is None


def test_the_thread_ends_with_a_worker_that_nobody_holds() -> None:
    commands, worker = Commands(), Rounds()
    commands.serve(worker)
    gone = weakref.ref(worker)
    thread = commands._thread
    assert thread is not None
    del worker
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    assert gone() is None
