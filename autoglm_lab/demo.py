"""`autoglm-lab demo`: the main job in the terminal. Text, an image and a sound are answered, and memory is given back.

The questions have known answers, so the demo says whether the model was right.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_lab import samples
from autoglm_lab.engine.protocol import Answer
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.opening import load
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import format_bytes, format_seconds
from autoglm_lab.workbench import Workbench

_TAP = re.compile(r'do\(action="Tap", element=\[(\d+),(\d+)\]\)')
_SAMPLES = ("home", "number", "key")
_PARKED = ("vision", "audio")


@dataclass(frozen=True)
class Question:
    """What is asked, and how to tell a right answer.

    Attributes:
        kind: ``text``, ``image``, ``audio`` or ``image and audio``.
        image, audio: the files that go with it.
        right: whether an answer is right.
        wanted: the right answer in words.
    """

    kind: str
    prompt: str
    image: Path | None
    audio: Path | None
    right: Callable[[str], bool]
    wanted: str

    @property
    def files(self) -> list[str]:
        return [file.name for file in (self.image, self.audio) if file is not None]


@dataclass(frozen=True)
class Report:
    """The answers, and the ledgers before and after the encoders were parked and woken again."""

    answers: tuple[tuple[Question, Answer], ...]
    ledgers: dict[str, Ledger]
    events: tuple[str, ...]
    seconds: float

    @property
    def correct(self) -> bool:
        return all(question.right(answer.text) for question, answer in self.answers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "correct": self.correct,
            "seconds": self.seconds,
            "answers": [
                {
                    "kind": question.kind,
                    "prompt": question.prompt,
                    "files": question.files,
                    "wanted": question.wanted,
                    "correct": question.right(answer.text),
                    **answer.to_dict(),
                }
                for question, answer in self.answers
            ],
            "ledgers": {name: ledger.to_dict() for name, ledger in self.ledgers.items()},
            "events": list(self.events),
        }


def run(say: Callable[[str], Any]) -> Report:
    """Run the demo, telling each step to ``say``.

    Raises:
        LabError: the model cannot be loaded or an answer fails.
    """
    started = time.monotonic()
    say("Loading autoglm-tiny, a model of 5.9 million parameters that is part of the package")
    # Outputs of encoders are not kept here, so that the last question really needs the parked one again.
    with load("autoglm-tiny", policy=MemoryPolicy(kv={"encoder_bytes": 0})) as wb:
        say(f"  {format_seconds(time.monotonic() - started)}, {wb.engine.capabilities.device}\n")
        asked = questions()
        answers = [_ask(wb, question, say) for question in asked]
        ledgers = {"before": wb.memory}
        say(f"Memory before parking\n{_indented(wb.memory)}\n")
        for name in _PARKED:
            say(f"  {wb.modules[name].park()}")
        wb.reclaim()
        ledgers["parked"] = wb.memory
        say(f"\nMemory after parking {' and '.join(_PARKED)}\n{_indented(wb.memory)}\n")
        say("A question that needs a parked module wakes it")
        answers.append(_ask(wb, asked[1], say))
        ledgers["woken"] = wb.memory
        events = tuple(str(event) for event in wb.events)
    report = Report(tuple(answers), ledgers, events, time.monotonic() - started)
    right = sum(question.right(answer.text) for question, answer in report.answers)
    freed = sum(ledgers["before"].nbytes(name) - ledgers["parked"].nbytes(name) for name in _PARKED)
    say(
        f"{right} of {len(report.answers)} answers right; while parked, {format_bytes(freed)} of weights were off the "
        f"device; {format_seconds(report.seconds)} in all"
    )
    return report


def questions() -> tuple[Question, ...]:
    """One question for each modality, and one for all at once, from the samples of the package."""
    text = Question("text", "你是谁?", None, None, lambda answer: "AutoGLM" in answer, "its name")
    return (text, *(_about(next(sample for sample in samples.SAMPLES if sample.name == name)) for name in _SAMPLES))


def _about(sample: samples.Sample) -> Question:
    kind = " and ".join(kind for kind, file in (("image", sample.image), ("audio", sample.audio)) if file is not None)

    def right(answer: str) -> bool:
        return answer == sample.answer if sample.area is None else _inside(answer, sample.area)

    return Question(kind, sample.prompt["en"], sample.image, sample.audio, right, sample.answer)


def _inside(text: str, area: tuple[int, int, int, int]) -> bool:
    """Whether the answer taps inside the area; both count 0 to 999 across the screen."""
    tap = _TAP.fullmatch(text)
    if tap is None:
        return False
    x, y = int(tap[1]), int(tap[2])
    return area[0] <= x <= area[2] and area[1] <= y <= area[3]


def _ask(wb: Workbench, question: Question, say: Callable[[str], Any]) -> tuple[Question, Answer]:
    # Each in a conversation of its own, so that the order does not matter.
    name = f"{question.kind} {1 + len(wb.conversations)}"
    answer = wb.chat(question.prompt, image=question.image, audio=question.audio, conversation=name).result()
    verdict = "right" if question.right(answer.text) else f"WRONG, wanted {question.wanted}"
    files = "".join(f" [{file}]" for file in question.files)
    say(f"{question.kind}:{files} {question.prompt}\n  -> {answer.text}\n     {verdict} · {answer.figures}\n")
    return question, answer


def _indented(ledger: Ledger) -> str:
    return "\n".join(f"  {line}" for line in str(ledger).splitlines())
