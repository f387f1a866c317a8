"""Dialogues that the embedded model never saw, answered by the engine as a person would get them."""

from __future__ import annotations

import importlib
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_lab.engine.protocol import Answer
from autoglm_lab.errors import ContextLimitError, LabError
from autoglm_lab.workbench import Workbench

PROJECT = Path(__file__).parents[2]
SEED = 57
"""The seed of the figures in recipes/tiny/README.md."""
_TOGETHER = 16
_LONGEST_ANSWER = 96
_SECONDS = 600


class Recipe:
    """What draws the dialogues and judges the answers: ``recipes/tiny`` of the project, which is not in the package.

    Raises:
        LabError: the package does not run from a checkout of the project.
    """

    def __init__(self) -> None:
        if not (PROJECT / "recipes" / "tiny" / "evaluate.py").is_file():
            raise LabError(
                f"the held-out dialogues are drawn by recipes/tiny, and {PROJECT} has none: run it from a checkout of "
                "the project (pip install -e .)"
            )
        if str(PROJECT) not in sys.path:
            sys.path.append(str(PROJECT))
        self._evaluate: Any = importlib.import_module("recipes.tiny.evaluate")
        self._makers: Any = importlib.import_module("recipes.tiny.conversations").EVALUATED

    def dialogues(self, task: str, count: int, seed: int = SEED) -> list[Any]:
        """The first ``count`` dialogues of a task, the same for the same seed."""
        chance = random.Random(f"held out {task} {seed}")
        return [self._makers[task](chance, "held") for _ in range(count)]

    def messages(self, dialogue: Any) -> list[dict[str, Any]]:
        """A dialogue up to its last question."""
        found: list[dict[str, Any]] = self._evaluate.as_a_user_would(dialogue)
        return found

    def right(self, dialogue: Any, answer: Answer) -> bool:
        """Whether all of an answer is right."""
        return bool(self._evaluate.is_right(dialogue, answer.reasoning.strip(), answer.text.strip()))

    def stock(self, model: Any, processor: Any, dialogues: list[Any]) -> int:
        """How many of them plain ``generate`` answers right."""
        return sum(outcome.correct for outcome in self._evaluate.answers(model, processor, dialogues, 32))


@dataclass(frozen=True)
class Outcome:
    """How the answers to some dialogues came out, dialogue by dialogue.

    Attributes:
        right: all of the answer was right.
        forgot: tokens were forgotten on the way.
        refused: the prompt did not fit the limit, and there was no answer.
    """

    right: tuple[bool, ...]
    forgot: tuple[bool, ...]
    refused: tuple[bool, ...]

    @property
    def share(self) -> float:
        """Right answers in %."""
        return 100 * sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share, in %."""
        return wilson(sum(self.right), len(self.right))

    def against(self, before: Outcome) -> tuple[int, int]:
        """Dialogues that were right ``before`` and are wrong now, and the other way round."""
        pairs = list(zip(self.right, before.right, strict=True))
        return sum(was and not now for now, was in pairs), sum(now and not was for now, was in pairs)


def answered(workbench: Workbench, recipe: Recipe, dialogues: Sequence[Any]) -> Outcome:
    """Answer dialogues under the workbench's policy, many at a time, each in a conversation of its own."""
    kv = workbench.policy.kv
    most = kv.max_tokens if kv.overflow in ("window", "evict") else None
    found: dict[int, tuple[bool, bool, bool]] = {}
    order = sorted(range(len(dialogues)), key=lambda number: _length(dialogues[number]))
    for at in range(0, len(order), _TOGETHER):
        turns = {
            number: workbench.engine.submit(
                recipe.messages(dialogues[number]),
                conversation=f"held out {number}",
                thinking=dialogues[number].thinking,
                max_new_tokens=_LONGEST_ANSWER,
            )
            for number in order[at : at + _TOGETHER]
        }
        for number, turn in turns.items():
            try:
                answer = turn.result(_SECONDS)
            except ContextLimitError:
                found[number] = (False, False, True)
            else:
                held = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1  # the last one is not read
                found[number] = (
                    recipe.right(dialogues[number], answer),
                    most is not None and held > most,
                    False,
                )
            workbench.drop(f"held out {number}")
    rows = [found[number] for number in range(len(dialogues))]
    right, forgot, refused = zip(*rows, strict=True)
    return Outcome(right, forgot, refused)


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in %."""
    z = 1.959964
    share, squared = right / count, z * z / count
    middle = (share + squared / 2) / (1 + squared)
    half = z / (1 + squared) * math.sqrt(share * (1 - share) / count + squared / (4 * count))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def _length(dialogue: Any) -> int:
    return sum(len(turn.text) + len(turn.answer) for turn in dialogue.turns)
