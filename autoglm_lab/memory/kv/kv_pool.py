"""Keys and values in pages: one pool for a model, so that conversations of any length decode together without padding.

A page holds `PAGE_TOKENS` tokens of every layer. A conversation owns pages, in order. A turn's tokens are committed
only when its step has ended, so a step that fails half-way through the layers leaves nothing behind.
"""

from __future__ import annotations

import heapq
import mmap
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import psutil
import torch
from torch import Tensor

from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.kv.host_pages import HostPages
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat, PageStore
from autoglm_lab.memory.kv.page_region import CudaPageRegion, HostPageRegion, PageRegion, PinnedPageRegion
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
    """The pages of one model on one device. Only the engine's thread takes and returns them.

    Args:
        form: what a page holds.
        place: ``host`` puts the pages of a GPU's model into pinned host memory, which the GPU reads from there; on a
            CPU machine the device is the host.
        pinned: what limits page-locked memory for prefixes that leave the device; None: nothing does.
        mirror: is told what happens to pages beside the steps; prefixes do not leave the device then.

    Attributes:
        store: the pages as tensors.
        prefixes: pages that several hold, or that are kept when nobody holds them.
    """

    def __init__(
        self,
        form: PageFormat,
        accelerator: Accelerator,
        place: Literal["device", "host"] = "device",
        pinned: PinnedBudget | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.form, self._accelerator, self._mirror = form, accelerator, mirror
        self._device = accelerator.device
        self.place: Literal["device", "host"] = place if accelerator.kind == "cuda" else "device"
        # Rows of the GPU's memory are read 512 bytes at a time; the kernel gives the host's back in pages of its own.
        grain = 512 if accelerator.kind == "cuda" else mmap.PAGESIZE
        self._stride = -(-form.nbytes // grain) * grain
        region, pages = self._reserve()
        self._region: PageRegion = region
        self._free: list[int] = []
        self._fresh, self._pages = 0, pages
        self._users: dict[int, int] = {}
        self._holders: dict[int, int] = {}
        self._shared = 0  # pages that several hold; counted as they change, since the sampler asks ten times a second
        second = accelerator.kind == "cuda" and self.place == "device" and mirror is None
        host = HostPages(form.nbytes, self._device, pinned) if second else None
        self.prefixes = PrefixStore(self, host, PAGE_TOKENS)
        self._closed = False
        self.store = PageStore(form, region.bytes[: pages * self._stride], self._stride)

    def _reserve(self) -> tuple[PageRegion, int]:
        """Addresses for as many pages as could ever be there, and their number."""
        if self._accelerator.kind == "cpu":
            pages = max(1, self._accelerator.total // self._stride)
            region = HostPageRegion(pages * self._stride, chunk=self._stride)
            return region, region.bytes.numel() // self._stride
        if self.place == "host":
            pages = max(1, psutil.virtual_memory().total // self._stride)
            return PinnedPageRegion(pages * self._stride, self._device), pages
        pages = max(1, self._accelerator.total // self._stride)
        return CudaPageRegion(pages * self._stride, self._device), pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, rounding included."""
        return self._stride

    @property
    def used_pages(self) -> int:
        return self._fresh - len(self._free)

    @property
    def backed(self) -> int:
        """Bytes of memory behind the pages: those in use, and those not given back yet."""
        return len(self._users) * self._region.chunk

    def take(self, count: int) -> list[int]:
        """``count`` pages; those that are only kept as prefixes make room where there is none.

        Raises:
            OutOfMemoryError: the device or the budget has no room; nothing was taken.
        """
        wanted = count * self._stride
        had = self._room() + max(0, self.backed - self.used_pages * self._stride)
        if count and wanted > had:
            had += self.prefixes.free(wanted - had)
        if count and (wanted > had or count > self._pages - self.used_pages):
            raise OutOfMemoryError("KV cache", wanted, had)
        self.prefixes.before_writing()
        taken: list[int] = []
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
        return taken

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
        for page in pages:
            del self._holders[page]
            heapq.heappush(self._free, page)
            for chunk in self._chunks(page):
                self._users[chunk] -= 1
        if self._device.type == "cpu":
            self.trim()

    def holders(self, page: int) -> int:
        """How many conversations hold a page."""
        return self._holders.get(page, 0)

    def copy(self, page: int) -> int:
        """A page of its own with the contents of ``page``. Raises `OutOfMemoryError`."""
        (own,) = self.take(1)
        self.raw(own).copy_(self.raw(page))
        if self._mirror is not None:
            self._mirror.copied(page, own)
        return own

    def raw(self, page: int) -> Tensor:
        """A page's bytes, whatever its format: ``uint8 [bytes]``."""
        return self.store.raw(page)

    def trim(self) -> int:
        """Give the memory of unused pages back to the system. Returns bytes."""
        idle = [chunk for chunk, users in self._users.items() if not users]
        self.give_back(idle)
        if idle and self._mirror is not None:
            self._mirror.gave_back(idle)
        return len(idle) * self._region.chunk

    def back_all(self, pages: Iterable[int]) -> None:
        """Back pages that another process has taken, which this one mirrors.

        Raises:
            OutOfMemoryError, MemoryError: the device or the budget has no room.
        """
        missing = sorted({chunk for page in pages for chunk in self._chunks(page)} - self._users.keys())
        wanted, had = len(missing) * self._region.chunk, self._room() if missing else 0
        if wanted > had:
            raise OutOfMemoryError("KV cache", wanted, had)
        for chunk in missing:
            self._region.back(chunk)
            self._users[chunk] = 0
            self._count(1)

    def give_back(self, chunks: Sequence[int]) -> None:
        """Give the memory of chunks back that no page in use lies in."""
        if chunks and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        with self._accelerator.moving():
            here = [chunk for chunk in chunks if chunk in self._users]
            for chunk in here:
                self._region.give_back(chunk)
                del self._users[chunk]
            self._count(-len(here))

    def holdings(self) -> Iterable[Row]:
        shared = self._shared
        if shared:
            counts = f"{shared * PAGE_TOKENS:,} tokens that several conversations begin with, stored once"
            yield Row("KV shared prefixes", "kv", self.place, shared * self._stride, counts)
        yield from self.prefixes.holdings(self.place)
        idle = self.backed - self.used_pages * self._stride
        if idle > 0:
            yield Row("KV pages, unused", "kv", self.place, idle, "pages that no conversation holds, kept for the next")

    def close(self) -> None:
        """Give everything back; again is no harm. The pool cannot be used afterwards."""
        if self._closed:
            return
        self._closed = True
        self.prefixes.close()
        self._count(-len(self._users))
        self._users.clear()
        del self.store
        self._region.close()

    def _back(self, page: int) -> None:
        for chunk in self._chunks(page):
            if chunk not in self._users:
                self._region.back(chunk)
                self._users[chunk] = 0
                self._count(1)
        for chunk in self._chunks(page):
            self._users[chunk] += 1

    def _chunks(self, page: int) -> range:
        start = page * self._stride
        return range(start // self._region.chunk, -(-(start + self._stride) // self._region.chunk))

    def _count(self, chunks: int) -> None:
        if chunks and self.place == "device":
            self._accelerator.hold(chunks * self._region.chunk)

    def _room(self) -> int:
        """Bytes that further pages may take."""
        return self._accelerator.headroom() if self.place == "device" else psutil.virtual_memory().available


class PagedSequence:
    """The keys and values of one conversation: its pages, in order.

    Attributes:
        tokens: how many it holds.
        first: how many of these are still the first ones of the conversation, where some after them were let go; None:
            all are there.
        latest: the slot from which on they are, without a gap, the latest ones.
    """

    def __init__(self, pool: KvPool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.tokens = 0
        self.first: int | None = None
        self.latest = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its pages, those included that others hold too."""
        return len(self.pages) * self.pool.page_bytes

    @property
    def own_nbytes(self) -> int:
        """Bytes of the pages that it alone holds."""
        # What is shared is what sequences begin with, so the first page of its own can be searched for.
        pages = tuple(self.pages)
        first = bisect_left(pages, -1, key=lambda page: -self.pool.holders(page))
        return (len(pages) - first) * self.pool.page_bytes

    def reserve(self, tokens: int) -> None:
        """Take pages for ``tokens`` more tokens. Raises `OutOfMemoryError`; nothing was taken then."""
        needed = -(-(self.tokens + tokens) // PAGE_TOKENS) - len(self.pages)
        if needed > 0:
            self.pages += self.pool.take(needed)

    def keep(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens and let the pages behind them go.

        A page that is cut while others hold it, or that is to be kept, is copied first, since the next tokens are
        written into it. Raises `OutOfMemoryError` where others need it and there is no room; all is as before then.
        """
        kept = -(-tokens // PAGE_TOKENS)
        if tokens % PAGE_TOKENS:
            cut = self.pages[kept - 1]
            others = self.pool.holders(cut) > 1
            if others or self.pool.prefixes.keeps(cut):
                self._copy(kept - 1, must=others)
            else:
                self.pool.prefixes.forget(cut)
        self.pool.put(self.pages[kept:])
        self.pages, self.tokens = self.pages[:kept], tokens
        if self.first is not None and tokens <= self.first:
            self.first, self.latest = None, 0

    def forget(self, tokens: int, sinks: int) -> bool:
        """Let whole pages go that hold at least ``tokens``, the oldest after the first ``sinks`` tokens.

        Returns:
            False, and nothing is changed, where there are not so many.
        """
        first, count = -(-sinks // PAGE_TOKENS), -(-tokens // PAGE_TOKENS)
        if (first + count) * PAGE_TOKENS > self.tokens:
            return False
        for page in self.pages[first : first + count]:
            if self.pool.holders(page) == 1:
                self.pool.prefixes.forget(page)  # what follows it stays in use, but not behind it
        self.pool.put(self.pages[first : first + count])
        del self.pages[first : first + count]
        self.tokens -= count * PAGE_TOKENS
        self._let_go_after(first * PAGE_TOKENS, max(first * PAGE_TOKENS, self.latest - count * PAGE_TOKENS))
        return True

    def evict(self, kept: Tensor, first: int, latest: int) -> None:
        """Keep the first tokens, those chosen by each layer and key head, and the latest, in as few pages as they take.

        Nothing is rounded anew, and keys stay rotated as they are. Pages that others hold are not written: others are
        taken for them, which raises `OutOfMemoryError` where there is no room, with nothing changed.

        Args:
            kept: slots ``[layers, kv_heads, count]``, in order, between the first and the latest tokens.
            first: a whole number of pages.
        """
        before, begin = torch.tensor(self.pages, device=kept.device), first // PAGE_TOKENS
        count = kept.shape[-1] + latest
        needed = -(-count // PAGE_TOKENS)
        own = [page for page in self.pages[begin:] if self.pool.holders(page) == 1][:needed]
        fresh = self.pool.take(needed - len(own))
        for page in own:
            self.pool.prefixes.forget(page)
        written = [*own, *fresh]
        places = torch.arange(count, device=kept.device)
        to_pages = torch.tensor(written, device=kept.device)[places // PAGE_TOKENS]
        moving = torch.arange(self.tokens - latest, self.tokens, device=kept.device)
        try:
            for layer, slots in enumerate(kept.unbind()):
                rows = torch.cat([slots.T, moving[:, None].expand(-1, slots.shape[0])])
                from_pages, from_slots = before[rows // PAGE_TOKENS], rows % PAGE_TOKENS
                self.pool.store.move(layer, from_pages, from_slots, to_pages, places % PAGE_TOKENS)
        except BaseException:
            self.pool.put(fresh)
            raise
        used = set(written)
        self.pool.put([page for page in self.pages[begin:] if page not in used])
        self.pages, self.tokens = [*self.pages[:begin], *written], first + count
        self._let_go_after(first, self.tokens - latest)

    def adopt(self, pages: Sequence[int]) -> None:
        """Begin anew with full pages that are held for it already (`PrefixStore.hold`)."""
        self.pool.put(self.pages)
        self.pages, self.tokens = list(pages), len(pages) * PAGE_TOKENS
        self.first, self.latest = None, 0

    def _let_go_after(self, first: int, latest: int) -> None:
        self.first = first if self.first is None else min(self.first, first)
        self.latest = latest

    def _copy(self, number: int, *, must: bool) -> None:
        """Go on with a copy of a page; with the page itself where there is no room and nobody else holds it."""
        page = self.pages[number]
        try:
            self.pages[number] = self.pool.copy(page)
        except OutOfMemoryError:
            if must:
                raise
            self.pool.prefixes.forget(page)
        else:
            self.pool.put([page])
