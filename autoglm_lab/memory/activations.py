"""Peaks of the engine's steps, from a trace of the model's own code on tensors without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autoglm_lab.memory.workload import Workload
from autoglm_lab.models.loading import Outline
from autoglm_lab.policy import KvPolicy


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that a step holds.

    Attributes:
        allocated: bytes in tensors, as the allocator rounds them.
        reserved: bytes that the allocator takes from the device for them.
    """

    allocated: int
    reserved: int

    @property
    def cached(self) -> int:
        return max(0, self.reserved - self.allocated)


class Activations:
    """What the steps of one model need beside weights, keys and values."""

    def __init__(self, outline: Outline, kind: Literal["cuda", "cpu"]) -> None:
        self._outline, self._kind = outline, kind
        self.notes: tuple[str, ...] = ("activations are not traced yet",)

    def prefill(self, kv: KvPolicy, prompt: int, chunk: int) -> Peak:
        return Peak(0, 0)

    def encode(self, workload: Workload, media: list[str]) -> Peak:
        return Peak(0, 0)

    def features(self, workload: Workload, media: list[str]) -> int:
        return 0

    def decode(self, batch: int, tokens: int) -> Peak:
        return Peak(0, 0)

    def graphs(self, batch: int) -> int:
        return 0

    def own_cache(self, tokens: int) -> int:
        return 0
