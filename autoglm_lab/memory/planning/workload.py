"""What is asked of a model: how much it reads and writes, for how many conversations."""

from __future__ import annotations

from dataclasses import dataclass

from autoglm_lab.memory.planning.training_load import TrainingLoad


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of request, the largest that has to fit.

    Attributes:
        context: tokens of the prompt, those of its images and sounds included.
        new_tokens: most tokens of the answer.
        images: in the prompt, each of ``image_size``; they are encoded one by one.
        image_size: ``(width, height)`` in pixels, before the processor resizes it.
        audio_seconds: length of one sound in the prompt; 0: none.
        conversations: kept at the same time, each as long as this one, and answering in one batch.
        training: what is learnt instead of answering; None: nothing.

    Raises:
        ValueError: a figure cannot be.
    """

    context: int = 8192
    new_tokens: int = 256
    images: int = 0
    image_size: tuple[int, int] = (1080, 2400)
    audio_seconds: float = 0.0
    conversations: int = 1
    training: TrainingLoad | None = None

    def __post_init__(self) -> None:
        if self.context < 1 or self.new_tokens < 1 or self.conversations < 1:
            raise ValueError("context, new_tokens and conversations are at least 1")
        if self.images < 0 or self.audio_seconds < 0 or min(self.image_size) < 1:
            raise ValueError("images and audio_seconds cannot be negative, and an image has at least one pixel")

    def __str__(self) -> str:
        if self.training is not None:
            return str(self.training)
        parts = [f"{self.context:,} tokens read", f"{self.new_tokens:,} written"]
        if self.images:
            parts.append(f"{self.images} image{'s' * (self.images > 1)} of {self.image_size[0]} x {self.image_size[1]}")
        if self.audio_seconds:
            parts.append(f"{self.audio_seconds:g} s of sound")
        if self.conversations > 1:
            parts.append(f"{self.conversations} conversations")
        return ", ".join(parts)
