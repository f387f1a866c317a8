"""The keys and values of one conversation: the pages that it owns, in order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS


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
    def own_pages(self) -> int:
        """How many pages it alone holds."""
        # What is shared is what sequences begin with, so the first page of its own can be searched for.
        pages = tuple(self.pages)
        return len(pages) - bisect_left(pages, -1, key=lambda page: -self.pool.holders(page))

    @property
    def own_nbytes(self) -> int:
        """Bytes of the pages that it alone holds."""
        return self.own_pages * self.pool.page_bytes

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
        before, begin = torch.tensor(self.pages), first // PAGE_TOKENS
        count = kept.shape[-1] + latest
        needed = -(-count // PAGE_TOKENS)
        own = [page for page in self.pages[begin:] if self.pool.holders(page) == 1][:needed]
        fresh = self.pool.take(needed - len(own))
        for page in own:
            self.pool.prefixes.forget(page)
        written = [*own, *fresh]
        places = torch.arange(count)
        to_pages, to_slots = torch.tensor(written)[places // PAGE_TOKENS], places % PAGE_TOKENS
        moving = torch.arange(self.tokens - latest, self.tokens)
        try:
            for layer, slots in enumerate(kept.cpu().unbind()):
                share, within = self.pool.of(layer)
                rows = torch.cat([slots.T, moving[:, None].expand(-1, slots.shape[0])])
                given = before[rows // PAGE_TOKENS], rows % PAGE_TOKENS, to_pages, to_slots
                share.store.move(within, *(one.to(share.device) for one in given))
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
