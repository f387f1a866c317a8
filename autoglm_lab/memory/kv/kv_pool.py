"""Keys and values in pages: one pool for a model, so that conversations of any length decode together without padding.

A page holds `PAGE_TOKENS` tokens of every layer. A conversation owns pages, in order. A turn's tokens are committed
only when its step has ended, so a step that fails half-way through the layers leaves nothing behind.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.kv.host_pages import HostPages
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat, PageStore
from autoglm_lab.memory.kv.page_share import PageShare, Place, shares_of
from autoglm_lab.memory.kv.prefix_store import PrefixStore
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.residency.pinned import PinnedBudget


class Mirror(Protocol):
    """Other processes that keep pages of the same numbers, with other heads of the same tokens."""

    def copied(self, page: int, own: int) -> None:
        """The contents of ``page`` are in ``own`` too."""
        ...

    def gave_back(self, chunks: Sequence[int]) -> None:
        """The memory of these chunks was given back."""
        ...


class KvPool:
    """The pages of one model. Only the engine's thread takes and returns them.

    Args:
        form: what a page holds.
        accelerators: the model's devices.
        place: ``host`` puts the pages of a GPU's model into pinned host memory, which the GPU reads from there; on a
            CPU machine the device is the host.
        pinned: what limits page-locked memory for prefixes that leave the device; None: nothing does.
        layers: of each layer, the number of its device; empty: all lie on the first.
        mirror: is told what happens to pages beside the steps; prefixes do not leave the device then.

    Attributes:
        shares: what each device holds of the pages.
        prefixes: pages that several hold, or that are kept when nobody holds them.
    """

    def __init__(
        self,
        form: PageFormat,
        *accelerators: Accelerator,
        place: Place = "device",
        pinned: PinnedBudget | None = None,
        mirror: Mirror | None = None,
        layers: Sequence[int] = (),
    ) -> None:
        self.form, self._accelerators, self._layers = form, accelerators, tuple(layers)
        self._pinned, self._mirror = pinned, mirror
        self.shares, self._at = shares_of(form, accelerators, layers, place)
        first = self.shares[0]
        self.place = first.place
        self._cards = tuple(accelerators.index(share.accelerator) for share in self.shares)
        self._pages = min(share.pages for share in self.shares)
        self._free: list[int] = []
        self._fresh = 0
        self._holders: dict[int, int] = {}
        self._shared = 0  # pages that several hold; counted as they change, since the sampler asks ten times a second
        # What leaves the device goes to the host in one piece, so pages of several devices do not.
        alone = len(self.shares) == 1 and mirror is None
        second = first.accelerator.kind == "cuda" and self.place == "device" and alone
        host = HostPages(form.nbytes, first.device, pinned) if second else None
        self.prefixes = PrefixStore(self, host, PAGE_TOKENS)
        self._closed = False

    def like(self, form: PageFormat, place: Place) -> KvPool:
        """An empty pool for the same model with pages of another kind."""
        pinned, mirror, layers = self._pinned, self._mirror, self._layers
        return KvPool(form, *self._accelerators, place=place, pinned=pinned, mirror=mirror, layers=layers)

    @property
    def store(self) -> PageStore:
        """The pages as tensors, where one device holds them all."""
        (share,) = self.shares
        return share.store

    def of(self, layer: int) -> tuple[PageShare, int]:
        """Who holds a layer's keys and values, and as which of its layers."""
        number, within = self._at[layer]
        return self.shares[number], within

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, rounding included."""
        return sum(share.stride for share in self.shares)

    def parted(self, pages: int) -> tuple[tuple[int, int], ...]:
        """Bytes of so many pages by the number of their device."""
        return tuple((card, pages * share.stride) for card, share in zip(self._cards, self.shares, strict=True))

    @property
    def used_pages(self) -> int:
        return self._fresh - len(self._free)

    @property
    def backed(self) -> int:
        """Bytes of memory behind the pages: those in use, and those not given back yet."""
        return sum(share.backed for share in self.shares)

    def take(self, count: int) -> list[int]:
        """``count`` pages. Where there is no room, what torch's allocator caches makes some, then those that are only
        kept as prefixes.

        Raises:
            OutOfMemoryError: a device or the budget has no room; nothing was taken.
        """
        missing, wanted, had = self._missing(count)
        if count and missing > 0:
            for share in self.shares:
                share.accelerator.empty_cache()  # a few ms; what is only cached need not fail a turn
            missing, wanted, had = self._missing(count)
        if count and missing > 0:
            self.prefixes.free(missing * self.page_bytes)
            missing, wanted, had = self._missing(count)
        if count and (missing > 0 or count > self._pages - self.used_pages):
            raise OutOfMemoryError("KV cache", wanted, had)
        self.prefixes.before_writing()
        taken, before = list[int](), self.backed
        try:
            for _ in range(count):
                page = heapq.heappop(self._free) if self._free else self._fresh
                self._fresh = max(self._fresh, page + 1)
                self._holders[page] = 1
                taken.append(page)
                self._back(page)
        except MemoryError:
            heapq.heappush(self._free, taken.pop())
            self.put(taken)
            raise OutOfMemoryError("KV cache", wanted, had) from None
        if self.backed > before:
            for share in self.shares:
                share.accelerator.count_driver()  # what maps the pages is the driver's own
        return taken

    def _missing(self, count: int) -> tuple[int, int, int]:
        """How many of ``count`` pages find no room; and of the device that lacks most, bytes needed and had."""
        found = []
        for share in self.shares:
            wanted, had = count * share.stride, share.room(self.used_pages)
            found.append((-(-(wanted - had) // share.stride), wanted, had))
        return max(found)

    def _back(self, page: int) -> None:
        done: list[PageShare] = []
        try:
            for share in self.shares:
                share.back(page)
                done.append(share)
        except MemoryError:
            for share in done:
                share.release([page])
            raise

    def share(self, pages: Iterable[int]) -> None:
        """Let one more conversation hold ``pages``, which are in use or kept."""
        for page in pages:
            if not self._holders[page]:
                self.prefixes.held(page)
            self._shared += self._holders[page] == 1
            self._holders[page] += 1

    def put(self, pages: Iterable[int]) -> None:
        """Let a conversation's pages go; those that no other holds are kept as prefixes, or free."""
        idle = []
        for page in pages:
            self._holders[page] -= 1
            self._shared -= self._holders[page] == 1
            if not self._holders[page] and not self.prefixes.released(page):
                idle.append(page)
        self.free(idle)
        self.prefixes.settle()

    def free(self, pages: Iterable[int]) -> None:
        """Free pages that nobody holds.

        On a CPU their memory goes back to the system at once, on CUDA with `trim`.
        """
        gone = tuple(pages)
        for page in gone:
            del self._holders[page]
            heapq.heappush(self._free, page)
        for share in self.shares:
            share.release(gone)
        if self.shares[0].device.type == "cpu":
            self.trim()

    def holders(self, page: int) -> int:
        """How many conversations hold a page."""
        return self._holders.get(page, 0)

    def copy(self, page: int) -> int:
        """A page of its own with the contents of ``page``. Raises `OutOfMemoryError`."""
        (own,) = self.take(1)
        for share in self.shares:
            share.raw(own).copy_(share.raw(page))
        if self._mirror is not None:
            self._mirror.copied(page, own)
        return own

    def raw(self, page: int) -> Tensor:
        """A page's bytes, whatever its format, where one device holds them all: ``uint8 [bytes]``."""
        return self.store.raw(page)

    def trim(self) -> int:
        """Give the memory of unused pages back to the system. Returns bytes."""
        given = 0
        for share in self.shares:
            idle = share.idle()
            given += share.give_back(idle)
            if idle and self._mirror is not None:
                self._mirror.gave_back(idle)
        return given

    def back_all(self, pages: Iterable[int]) -> None:
        """Back pages that another process has taken, which this one mirrors. Raises as `PageShare.back_all`."""
        for share in self.shares:
            share.back_all(pages)

    def give_back(self, chunks: Sequence[int]) -> None:
        """Give the memory of chunks back that no page in use lies in."""
        for share in self.shares:
            share.give_back(chunks)

    def holdings(self) -> Iterable[Row]:
        shared = self._shared
        if shared:
            counts = f"{shared * PAGE_TOKENS:,} tokens that several conversations begin with, stored once"
            for card, nbytes in self.parted(shared):
                yield Row("KV shared prefixes", "kv", self.place, nbytes, counts, card=card)
        yield from self.prefixes.holdings(self.place)
        for card, share in zip(self._cards, self.shares, strict=True):
            idle = share.backed - self.used_pages * share.stride
            if idle > 0:
                counts = "pages that no conversation holds, kept for the next"
                yield Row("KV pages, unused", "kv", self.place, idle, counts, card=card)

    def close(self) -> None:
        """Give everything back; again is no harm. The pool cannot be used afterwards."""
        if self._closed:
            return
        self._closed = True
        self.prefixes.close()
        for share in self.shares:
            share.close()
