"""What one device holds of every page: the keys and values of its layers, and the memory behind them."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import psutil
import torch
from torch import Tensor

from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.kv.page_format import PageFormat, PageStore
from autoglm_lab.memory.kv.page_region import CudaPageRegion, HostPageRegion, PageRegion, PinnedPageRegion

Place = Literal["device", "host"]


class PageShare:
    """The pages of one device. A page has the same number on every device of its pool.

    Args:
        form: what it holds of a page: as many layers as it is responsible for.
        place: ``host`` puts the pages of a GPU's layers into pinned host memory; on a CPU the device is the host.

    Attributes:
        store: the pages as tensors.
        stride: bytes of one page, rounding included.
        pages: how many there could ever be.
    """

    def __init__(self, form: PageFormat, accelerator: Accelerator, place: Place = "device") -> None:
        self.form, self.accelerator, self.device = form, accelerator, accelerator.device
        self.place: Place = place if accelerator.kind == "cuda" else "device"
        # Rows of the GPU's memory are read 512 bytes at a time; the kernel gives the host's back in pages of its own.
        grain = 512 if accelerator.kind == "cuda" else mmap.PAGESIZE
        self.stride = -(-form.nbytes // grain) * grain
        self._region, self.pages = self._reserve()
        self._users: dict[int, int] = {}
        self.store = PageStore(form, self._region.bytes[: self.pages * self.stride], self.stride)

    def _reserve(self) -> tuple[PageRegion, int]:
        """Addresses for as many pages as could ever be there, and their number."""
        if self.accelerator.kind == "cpu":
            pages = max(1, self.accelerator.total // self.stride)
            region = HostPageRegion(pages * self.stride, chunk=self.stride)
            return region, region.bytes.numel() // self.stride
        if self.place == "host":
            pages = max(1, psutil.virtual_memory().total // self.stride)
            return PinnedPageRegion(pages * self.stride, self.device), pages
        pages = max(1, self.accelerator.total // self.stride)
        return CudaPageRegion(pages * self.stride, self.device), pages

    @property
    def backed(self) -> int:
        """Bytes of memory behind the pages: those in use, and those not given back yet."""
        return len(self._users) * self._region.chunk

    def room(self, used: int) -> int:
        """Bytes that further pages may take, with ``used`` pages in use: memory comes in whole chunks."""
        chunk = self._region.chunk
        return self._free() // chunk * chunk + max(0, self.backed - used * self.stride)

    def _free(self) -> int:
        return self.accelerator.headroom() if self.place == "device" else psutil.virtual_memory().available

    def back(self, page: int) -> None:
        """Put memory behind a page. Raises `MemoryError` where there is none; nothing was taken then."""
        begun: list[int] = []
        try:
            for chunk in self._chunks(page):
                if chunk not in self._users:
                    self._region.back(chunk)
                    self._users[chunk] = 0
                    self._count(1)
                self._users[chunk] += 1
                begun.append(chunk)
        except MemoryError:
            for chunk in begun:
                self._users[chunk] -= 1
            raise

    def release(self, pages: Iterable[int]) -> None:
        """Pages are not used any more: their memory goes with the next `give_back`."""
        for page in pages:
            for chunk in self._chunks(page):
                self._users[chunk] -= 1

    def idle(self) -> list[int]:
        """Chunks of memory that no page in use lies in."""
        return [chunk for chunk, users in self._users.items() if not users]

    def give_back(self, chunks: Sequence[int]) -> int:
        """Give the memory of idle chunks back to the system. Returns bytes."""
        here = [chunk for chunk in chunks if chunk in self._users]
        if here and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self.accelerator.moving():
            for chunk in here:
                self._region.give_back(chunk)
                del self._users[chunk]
            self._count(-len(here))
        return len(here) * self._region.chunk

    def back_all(self, pages: Iterable[int]) -> None:
        """Put memory behind pages without counting their use, which another process does.

        Raises:
            OutOfMemoryError, MemoryError: the device or the budget has no room.
        """
        missing = sorted({chunk for page in pages for chunk in self._chunks(page)} - self._users.keys())
        wanted, had = len(missing) * self._region.chunk, self._free() if missing else 0
        if wanted > had:
            raise OutOfMemoryError("KV cache", wanted, had)
        for chunk in missing:
            self._region.back(chunk)
            self._users[chunk] = 0
            self._count(1)

    def close(self) -> None:
        """Give everything back."""
        self._count(-len(self._users))
        self._users.clear()
        del self.store
        self._region.close()

    def raw(self, page: int) -> Tensor:
        """What it holds of a page, whatever its format: ``uint8 [bytes]``."""
        return self.store.raw(page)

    def _chunks(self, page: int) -> range:
        start = page * self.stride
        return range(start // self._region.chunk, -(-(start + self.stride) // self._region.chunk))

    def _count(self, chunks: int) -> None:
        if chunks and self.place == "device":
            self.accelerator.hold(chunks * self._region.chunk)


def shares_of(
    form: PageFormat, accelerators: Sequence[Accelerator], layers: Sequence[int], place: Place
) -> tuple[tuple[PageShare, ...], tuple[tuple[int, int], ...]]:
    """The shares of several devices, and of each layer the number of its share and its place in it.

    Args:
        layers: of each layer, the number of its device; empty: all lie on the first.
    """
    of_layer = list(layers) or [0] * form.layers
    counts = [0] * len(accelerators)
    places = []
    for number in of_layer:
        places.append((number, counts[number]))
        counts[number] += 1
    used = [number for number, count in enumerate(counts) if count]
    shares = tuple(PageShare(replace(form, layers=counts[number]), accelerators[number], place) for number in used)
    return shares, tuple((used.index(number), within) for number, within in places)
