"""Pages on the host: a second place for those that leave the device, and the copies between the two."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from autoglm_lab.memory.residency.pinned import PinnedBudget
from autoglm_lab.memory.residency.slab import HostSlab

_CHUNK = 32 << 20


class HostPages:
    """Slots of one page each, in chunks of host memory that are taken when needed and given back when empty.

    Chunks are pinned beside a GPU, where that is allowed and works. Copies to and from a GPU run on a stream of their
    own, in order: `settle` lets the device's next work wait for those that read pages which are now free.

    Args:
        page_bytes: bytes of a slot.
        device: where the pages come from.
        pinned: what limits page-locked memory; None: nothing does.

    Attributes:
        copied_out, copied_in: bytes that left the device, and came back, since the start.
    """

    def __init__(self, page_bytes: int, device: torch.device, pinned: PinnedBudget | None = None) -> None:
        self._page_bytes, self._device, self._cuda = page_bytes, device, device.type == "cuda"
        self._pinned = pinned
        self._per_chunk = max(1, _CHUNK // page_bytes)
        self._chunks: dict[int, HostSlab] = {}
        self._bytes: dict[int, Tensor] = {}
        self._used: dict[int, int] = {}
        self._free: list[int] = []
        self._stream: torch.cuda.Stream | None = None
        self._reading: torch.cuda.Event | None = None
        self.copied_out = self.copied_in = 0

    @property
    def used(self) -> int:
        """Slots in use."""
        return sum(tuple(self._used.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held, empty slots of chunks in use included."""
        return sum(slab.committed for slab in tuple(self._chunks.values()))

    @property
    def pinned(self) -> bool:
        return all(slab.pinned for slab in tuple(self._chunks.values()))

    def take(self) -> int | None:
        """A slot; None where the host has no memory for it."""
        if not self._free and not self._grow():
            return None
        slot = heapq.heappop(self._free)
        self._used[slot // self._per_chunk] += 1
        return slot

    def put(self, slots: Sequence[int]) -> None:
        """Let slots go; chunks without any give their memory back, but for one, since pinning takes time."""
        for slot in slots:
            heapq.heappush(self._free, slot)
            self._used[slot // self._per_chunk] -= 1
        for chunk in [chunk for chunk, used in self._used.items() if not used][1:]:
            self._give_back(chunk)

    def save(self, pages: Sequence[Tensor], slots: Sequence[int]) -> None:
        """Copy ``pages`` (``uint8`` ``[page_bytes]`` each) out. Returns before the copies have ended."""
        with self._after_the_device():
            for page, slot in zip(pages, slots, strict=True):
                self._slot(slot).copy_(page, non_blocking=True)
        self._reading = self._mark()
        self.copied_out += len(slots) * self._page_bytes

    def load(self, slots: Sequence[int], pages: Sequence[Tensor]) -> None:
        """Copy slots into ``pages``; what the device does from now on waits for the copies, no thread does."""
        with self._after_the_device():
            for slot, page in zip(slots, pages, strict=True):
                page.copy_(self._slot(slot), non_blocking=True)
        event = self._mark()
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        self.copied_in += len(slots) * self._page_bytes

    def settle(self) -> None:
        """Let the device's next work wait until pages that were saved have been read: they may be written then."""
        if self._reading is not None:
            torch.cuda.current_stream(self._device).wait_event(self._reading)
            self._reading = None

    def trim(self) -> None:
        """Give the memory of every empty chunk back."""
        for chunk in [chunk for chunk, used in self._used.items() if not used]:
            self._give_back(chunk)

    def close(self) -> None:
        """Give everything back."""
        for chunk in tuple(self._chunks):
            self._give_back(chunk)

    def _grow(self) -> bool:
        chunk = next(number for number in range(len(self._chunks) + 1) if number not in self._chunks)
        slab = HostSlab(self._per_chunk * self._page_bytes, pin=self._cuda, budget=self._pinned)
        try:
            region = slab.commit()
        except (OSError, MemoryError):
            return False
        if self._cuda:
            try:
                slab.touch()  # locking untouched pages is slower
            except MemoryError:
                del region
                slab.close()
                return False
            slab.pin()
        self._chunks[chunk], self._bytes[chunk], self._used[chunk] = slab, region, 0
        first = chunk * self._per_chunk
        for slot in range(first, first + self._per_chunk):
            heapq.heappush(self._free, slot)
        return True

    def _give_back(self, chunk: int) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        first = chunk * self._per_chunk
        self._free = [slot for slot in self._free if not first <= slot < first + self._per_chunk]
        heapq.heapify(self._free)
        del self._bytes[chunk], self._used[chunk]
        self._chunks.pop(chunk).close()

    def _slot(self, slot: int) -> Tensor:
        start = slot % self._per_chunk * self._page_bytes
        return self._bytes[slot // self._per_chunk][start : start + self._page_bytes]

    def _after_the_device(self) -> torch.cuda.StreamContext:
        if self._cuda:
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _mark(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()
