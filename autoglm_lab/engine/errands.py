"""Parks beside a GPU, asked for from any thread: cheap enough to be begun while the device computes a step."""

from __future__ import annotations

import time
from collections import deque

import torch

from autoglm_lab.engine.state import EngineState
from autoglm_lab.errors import EngineClosedError
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency.module_residency import ParkPlace
from autoglm_lab.memory.residency.move import Move


class Errands:
    """Parks that wait for the engine's thread. Only that thread serves them."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._asked: deque[tuple[str, ParkPlace, Move]] = deque()
        self._before: torch.cuda.Event | None = None

    def ask(self, module: str, place: ParkPlace) -> Move:
        """Ask for a park, from any thread. Returns at once."""
        move = Move()
        self._asked.append((module, place, move))
        return move

    def mark(self) -> None:
        """A round of steps is about to be given to the device."""
        if self._state.accelerator.kind == "cuda":
            self._before = torch.cuda.current_stream(self._state.accelerator.device).record_event()

    def serve(self) -> None:
        """Begin every park that was asked for. Call it between steps."""
        for _ in range(len(self._asked)):
            self._park(*self._asked.popleft(), None)

    def serve_meanwhile(self) -> None:
        """Begin those of modules that the step under way does not use: their memory need not wait for its end."""
        for _ in range(len(self._asked)):
            module, place, move = self._asked.popleft()
            if module in self._state.in_use:
                self._asked.append((module, place, move))
            else:
                self._park(module, place, move, self._before)

    def close(self) -> None:
        """Refuse what was not begun."""
        while self._asked:
            self._asked.popleft()[2].fail(EngineClosedError("this workbench was closed: load the model again"))

    def _park(self, module: str, place: ParkPlace, move: Move, after: torch.cuda.Event | None) -> None:
        try:
            move.follow(self._state.residency[module].park(place, "asked", after=after))
        except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
            self._state.event_of(Event(time.time(), "note", module, why=f"not parked: {error}"))
            move.fail(error)
