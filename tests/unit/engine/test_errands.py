from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autoglm_lab.engine.errands import Errands
from autoglm_lab.errors import EngineClosedError, ModuleError
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency.move import Move


class Module:
    """Notes what it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.parked: list[tuple[Any, ...]] = []
        self._error = error

    def park(self, place: str, why: str, *, after: Any) -> Move:
        if self._error is not None:
            raise self._error
        self.parked.append((place, why, after))
        return Move.ended(Event(0.0, "parked", "it", 5, 0.1, why))


@pytest.fixture
def state() -> Any:
    events: list[Event] = []
    return SimpleNamespace(
        residency={"vision": Module(), "text": Module(), "audio": Module(ModuleError("audio is viewed"))},
        in_use=frozenset({"text"}),
        accelerator=SimpleNamespace(kind="cpu"),
        events=events,
        event_of=events.append,
    )


def test_a_step_is_not_robbed_of_the_modules_that_it_uses(state: Any) -> None:
    errands = Errands(state)
    text, vision = errands.ask("text", "auto"), errands.ask("vision", "disk")
    errands.serve_meanwhile()
    assert vision.result(0).nbytes == 5
    assert not text.done
    assert state.residency["vision"].parked == [("disk", "asked", None)]
    errands.serve()
    assert text.done


def test_a_park_that_cannot_be_is_raised_by_its_result_and_told(state: Any) -> None:
    errands = Errands(state)
    move = errands.ask("audio", "auto")
    errands.serve()
    with pytest.raises(ModuleError, match="audio is viewed"):
        move.result(0)
    assert [(event.kind, event.why) for event in state.events] == [("note", "not parked: audio is viewed")]


def test_nobody_waits_for_ever_for_a_park_that_was_not_begun(state: Any) -> None:
    errands = Errands(state)
    move = errands.ask("vision", "auto")
    errands.close()
    with pytest.raises(EngineClosedError, match="load the model again"):
        move.result(0)
