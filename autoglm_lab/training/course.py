"""What is learnt, and how: everything about a training but its memory, which the policy holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Final, Literal, get_args

from autoglm_lab.errors import TrainingError

Method = Literal["lora", "full"]
Schedule = Literal["cosine", "constant"]

_Limit = tuple[str, type, Callable[[Any], bool]]
_COUNT: Final[_Limit] = ("a whole number, at least 1", Integral, lambda value: value >= 1)
_SIZE: Final[_Limit] = ("a number of more than 0", Real, lambda value: value > 0)
_LIMITS: Final[dict[str, _Limit]] = {
    **dict.fromkeys(("rank", "steps", "save_every", "max_tokens"), _COUNT),
    **dict.fromkeys(("alpha", "epochs", "learning_rate"), _SIZE),
    "warm_up": ("a whole number, at least 0", Integral, lambda value: value >= 0),
    "weight_decay": ("a number, at least 0", Real, lambda value: value >= 0),
    "ema": ("a number of more than 0 and less than 1", Real, lambda value: 0 < value < 1),
}
_OPTIONAL: Final = ("steps", "save_every", "max_tokens", "ema")


@dataclass(frozen=True)
class Course:
    """What is learnt and how, memory apart.

    Attributes:
        method: ``lora``: low-rank adapters; ``full``: the weights of ``modules`` themselves.
        name: of the adapter.
        rank, alpha: of the adapter; it is scaled by alpha / rank.
        targets: linear layers with an adapter; None: all of the decoder.
        modules: that learn with ``full``.
        steps: of the optimiser; None: ``epochs`` times through the data.
        epochs: see ``steps``.
        learning_rate: at its highest, after ``warm_up`` steps.
        schedule: of the learning rate then: ``cosine``: it falls to 0; ``constant``: it stays, for use with ``ema``.
        ema: what is learnt is the exponential moving average of what the steps made, with this decay (0.99: of about
            the last 100 steps), kept in float32 on the host; None: what the last step made.
        weight_decay: of AdamW, on matrices alone: what learns becomes ``learning_rate * weight_decay`` of itself less a
            step. An adapter then stays small where the data does not ask for it.
        all_answers: learn every answer of a dialogue, not only the last.
        max_tokens: of a dialogue; longer ones are left out.
        save_every: steps between two checkpoints; None: at the end alone.
        out: folder of the checkpoints; None: a temporary one.
        resume: go on from the last whole checkpoint of ``out``.
        seed: of the order of the data and of the adapter's first values.
    """

    method: Method = "lora"
    name: str = "default"
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None
    modules: tuple[str, ...] = ("text",)
    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 1e-3
    warm_up: int = 10
    schedule: Schedule = "cosine"
    ema: float | None = None
    weight_decay: float = 0.0
    all_answers: bool = False
    max_tokens: int | None = None
    save_every: int | None = None
    out: Path | None = None
    resume: bool = False
    seed: int = 0

    def total_steps(self, dialogues: int, batch: int) -> int:
        return self.steps or max(1, round(self.epochs * -(-dialogues // batch)))


def course_of(**settings: Any) -> Course:
    """A course from its settings.

    Raises:
        TrainingError: there is no such setting, or its value cannot be.
    """
    known = [field.name for field in fields(Course)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TrainingError(f"there is no setting '{unknown[0]}' of a training; there are {', '.join(known)}")
    for name in ("targets", "modules"):
        if isinstance(settings.get(name), list):
            settings[name] = tuple(settings[name])
    if isinstance(settings.get("out"), str):
        settings["out"] = Path(settings["out"])
    course = Course(**settings)
    _check(course)
    return course


def _check(course: Course) -> None:
    for name, (wanted, kind, fits) in _LIMITS.items():
        value = getattr(course, name)
        if value is None and name in _OPTIONAL:
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
            raise TrainingError(f"{name} must be {wanted} (got {value!r})")
    for name, choices in (("method", get_args(Method)), ("schedule", get_args(Schedule))):
        if getattr(course, name) not in choices:
            words = " or ".join(map(repr, choices))
            raise TrainingError(f"there is no {name} '{getattr(course, name)}': use {words}")
    if course.resume and course.out is None:
        raise TrainingError("resume needs the folder that holds the checkpoints: give out=")
