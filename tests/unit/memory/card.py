"""A GPU without a GPU: what `Accelerator` asks of its machine, with figures that a test sets."""

from __future__ import annotations

from autoglm_lab.memory.reading import Reading
from autoglm_lab.units import GiB, MiB


class Card:
    """Stands for `CudaMachine`: 24 GiB, 600 MiB of context."""

    name = "GPU of 24 GiB"
    notes: tuple[str, ...] = ()
    total = 24 * GiB
    context = 600 * MiB

    def __init__(self, device: object = None) -> None:
        self.hidden = False
        self.driver = self.context
        self.allocated = self.reserved = self.outside = self.workspaces = 0
        self.cap: int | None = None
        self.asked = 0

    def process_bytes(self) -> int | None:
        self.asked += 1
        return None if self.hidden else self.driver + self.reserved + self.outside

    def allocator(self) -> tuple[int, int]:
        return self.allocated, self.reserved

    def reading(self, slabs: int, taken: int) -> Reading:
        process = self.reserved + slabs + taken if self.hidden else self.process_bytes()
        used = self.driver + self.reserved + self.outside + 2 * GiB
        return Reading(
            1.0, self.total, self.total - used - GiB // 4, used, process, GiB // 4, self.allocated, self.reserved, slabs
        )

    def cap_allocator(self, nbytes: int | None) -> None:
        self.cap = nbytes

    def take_workspaces(self) -> None:
        self.driver += 8 * MiB
        self.workspaces += 32 * MiB
        self.allocated += 32 * MiB
        self.reserved += 32 * MiB

    def trim(self) -> None:
        self.reserved = self.allocated
