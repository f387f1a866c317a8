"""Random requests, the same for the same seed: what many people do at once to one workbench."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoglm_lab.bench.prompts import said, screen, text_of, user
from autoglm_lab.engine.protocol import Answer, MemoryEvent, Turn
from autoglm_lab.errors import LabError
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.workbench import Workbench

_CONVERSATIONS = 8
_MOST_CASES = 20
IN_FLIGHT = 4


@dataclass(frozen=True)
class Scale:
    """How large requests are.

    Attributes:
        long: tokens of the longest prompt.
        tallest: pixels of the tallest image; the lowest has 336 where that is less.
        answer: tokens of the longest answer.
        sample: share of the answers that are asked for once more.
    """

    long: int
    tallest: int
    answer: int
    sample: float


@dataclass(frozen=True)
class Case:
    """An answer to ask for once more: the whole dialogue with its question, and what was answered."""

    messages: list[dict[str, Any]]
    tokens: int
    text: str


@dataclass(frozen=True)
class _Flight:
    """A turn under way."""

    conversation: str
    question: dict[str, Any]
    tokens: int
    turn: Turn


class Traffic:
    """Requests to a workbench.

    Args:
        seed: of everything that is random.

    Attributes:
        outcomes: how requests ended: finish reasons, names of typed errors, ``crashed`` for every other error.
        crashes: those other errors.
        cases: answers to ask for once more.
    """

    def __init__(self, workbench: Workbench, scale: Scale, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.crashes: list[str] = []
        self.cases: list[Case] = []
        self._wb, self._scale, self._chance = workbench, scale, random.Random(seed)
        self._dialogues: dict[str, list[dict[str, Any]]] = {}
        self._flying: list[_Flight] = []
        self._moves: list[Move] = []

    def request(self) -> None:
        """Ask something; at times park a module before, forget a conversation, or stop the answer in mid-stream."""
        chance, wb = self._chance, self._wb
        if chance.random() < 0.15:
            module = wb.modules[chance.choice(list(wb.modules))]
            self._guarded("parks asked for", lambda: self._moves.append(module.park()))
        busy = {flight.conversation for flight in self._flying}
        names = [f"soak {number}" for number in range(_CONVERSATIONS)]
        name = chance.choice([one for one in names if one not in busy])
        if chance.random() < 0.1 and name in self._dialogues:
            self._forget(name)
        question, tokens = self._question(), chance.randint(1, self._scale.answer)
        stops = chance.random() < 0.1
        try:
            turn = wb.engine.submit([question], conversation=name, max_new_tokens=tokens)
        except LabError as error:
            self.outcomes[type(error).__name__] += 1
            return
        if stops:
            turn.on_change(lambda: turn.cancel() if turn.text else None)
        self._flying.append(_Flight(name, question, tokens, turn))
        self.land(chance.randrange(IN_FLIGHT))

    def land(self, left: int = 0) -> None:
        """Wait until only ``left`` turns are under way."""
        while len(self._flying) > left:
            flight = self._flying.pop(0)
            try:
                answer = flight.turn.result(300)
            except LabError as error:
                self.outcomes[type(error).__name__] += 1
            except Exception as error:  # noqa: BLE001 - a crash is what is looked for
                self._crashed(error)
            else:
                self.outcomes[answer.finish_reason] += 1
                self._keep(flight, answer)
        while self._moves and (self._moves[0].done or not left):
            self._guarded("parked", self._moves.pop(0).result)

    def _keep(self, flight: _Flight, answer: Answer) -> None:
        name = flight.conversation
        dropped = any(isinstance(event, MemoryEvent) and event.event.kind == "dropped" for event in flight.turn)
        asked = [*self._dialogues.get(name, []), flight.question]
        sampled = self._chance.random() < self._scale.sample and len(self.cases) < _MOST_CASES
        if sampled and answer.finish_reason == "length" and not dropped:
            self.cases.append(Case(asked, flight.tokens, answer.reasoning + answer.text))
        if dropped:  # only the engine knows what is left of it
            self._forget(name)
        elif answer.usage.completion_tokens:
            self._dialogues[name] = [*asked, said("assistant", answer.text)]

    def _question(self) -> dict[str, Any]:
        chance, scale = self._chance, self._scale
        kind = chance.choices(["text", "image", "long"], [45, 35, 20])[0]
        seed = chance.randrange(1 << 30)
        if kind == "image":
            height = chance.randint(min(336, scale.tallest), scale.tallest)
            return user("what is on it?", screen(seed, height * 9 // 20, height))
        return user(text_of(self._wb, chance.randint(4, scale.long if kind == "long" else min(200, scale.long)), seed))

    def _forget(self, name: str) -> None:
        self._guarded("dropped", lambda: self._wb.drop(name))
        self._dialogues.pop(name, None)

    def _guarded(self, what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except LabError as error:
            self.outcomes[f"not {what} ({type(error).__name__})"] += 1
        except Exception as error:  # noqa: BLE001 - a crash is what is looked for
            self._crashed(error)
        else:
            self.outcomes[what] += 1

    def _crashed(self, error: Exception) -> None:
        self.outcomes["crashed"] += 1
        self.crashes.append(f"{type(error).__name__}: {error}")
