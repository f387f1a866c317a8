"""The caches of one step's conversations, as a transformers model takes them: ``past_key_values`` of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from autoglm_lab.memory.kv import paged_kernels
from autoglm_lab.memory.kv.host_prefetch import HostPrefetch
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS
from autoglm_lab.memory.kv.paged_sequence import PagedSequence


@dataclass(frozen=True)
class _Reads:
    """Where a step's tokens are, as one device reads it.

    Attributes:
        table: pages of each row, ``int32 [batch, pages]``.
        lengths: tokens of each row with the new ones, ``int32 [batch]``.
        places: page and slot of the new tokens, ``[batch, new]`` each; empty where kernels write them.
    """

    table: Tensor
    lengths: Tensor
    places: tuple[Tensor, ...]

    @classmethod
    def on(cls, device: torch.device, table: list[list[int]], before: list[int], new: int, *, placed: bool) -> _Reads:
        at = torch.tensor(table, device=device, dtype=torch.int32)
        starts = torch.tensor(before, device=device, dtype=torch.int32)
        if not placed:
            return cls(at, starts + new, ())
        places = starts[:, None] + torch.arange(new, device=device)
        return cls(at, starts + new, (at.gather(1, places.long() // PAGE_TOKENS), places % PAGE_TOKENS))


class PagedCache(Cache):
    """Keys and values in pages for one forward.

    Each row of the batch is a sequence; every row reads the same number of new tokens. Attention sees, for row b, its
    tokens and then the new ones. Where the model's attention is not ours (see `paged_attention`), keys and values are
    gathered into one tensor, whose shorter rows are padded at the end, which `mask` hides.

    Args:
        sequences: pages for the new tokens are taken; `OutOfMemoryError` is raised where there are none.
        gathers: the model's own attention reads what `update` returns.
    """

    def __init__(self, sequences: Sequence[PagedSequence], new_tokens: int, *, gathers: bool = True) -> None:
        pool = sequences[0].pool
        self.pool, self.sequences, self.new_tokens, self.gathers = pool, sequences, new_tokens, gathers
        taken: list[tuple[PagedSequence, int]] = []
        try:
            for sequence in sequences:
                taken.append((sequence, sequence.tokens))
                sequence.reserve(new_tokens)
        except BaseException:
            for sequence, tokens in taken:
                sequence.keep(tokens)
            raise
        self.before = [sequence.tokens for sequence in sequences]
        self.longest = max(self.before) + new_tokens
        width = -(-self.longest // PAGE_TOKENS)
        table = [
            [*sequence.pages[:width], *[sequence.pages[0]] * (width - len(sequence.pages))] for sequence in sequences
        ]
        self._kernels = all(paged_kernels.available(share) for share in pool.shares)
        self._reads = {
            share: _Reads.on(share.device, table, self.before, new_tokens, placed=not self._kernels)
            for share in pool.shares
        }
        self._latest: tuple[int, Tensor, Tensor] | None = None
        super().__init__(layers=[PagedLayer(self, index) for index in range(pool.form.layers)])

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU computes, whose attention takes fewer heads of keys than of queries also beside a mask."""
        return self.pool.shares[0].device.type == "cpu"

    def put(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values ``[batch, kv_heads, new, head_dim]`` of a layer.

        Returns:
            Those of all tokens, ``[batch, kv_heads, longest, head_dim]``, for the model's own attention; what was given
            where ours will read the pages.
        """
        share, within = self.pool.of(layer)
        at = self._reads[share]
        if self._kernels:
            paged_kernels.write(share, within, keys, values, at.table, at.lengths)
        else:
            pages, slots = at.places
            share.store.write(within, pages, slots, keys.transpose(1, 2), values.transpose(1, 2))
        self._latest = layer, keys, values
        return self.read() if self.gathers else (keys, values)

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer that was written last: ``[batch, kv_heads, longest, head_dim]`` each."""
        assert self._latest is not None
        layer, keys, values = self._latest
        if not any(self.before) and self.pool.form.precision == "model":
            return keys, values  # nothing else is there
        share, within = self.pool.of(layer)
        table = self._reads[share].table
        if self._kernels:
            return paged_kernels.read(share, within, table, self.longest)
        keys, values = share.store.read(within, table)
        return keys[:, :, : self.longest], values[:, :, : self.longest]

    def attend(self, query: Tensor, scale: float) -> Tensor | None:
        """Attention of one new token a row over pages, ``[batch, 1, heads, head_dim]``; None where it must gather."""
        if not self._kernels or self.new_tokens > 1 or self._latest is None:
            return None
        share, within = self.pool.of(self._latest[0])
        at = self._reads[share]
        return paged_kernels.attend(share, within, query, scale, at.table, at.lengths)

    def mask(self, dtype: torch.dtype, *, additive: bool) -> Tensor | None:
        """What each row's single new token may see: ``[batch, 1, 1, longest]``; None where no row is padded."""
        if len(set(self.before)) == 1:
            return None
        share, _ = self.pool.of(0 if self._latest is None else self._latest[0])
        lengths = self._reads[share].lengths
        seen = (torch.arange(self.longest, device=lengths.device)[None] < lengths[:, None])[:, None, None]
        if not additive:
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def commit(self) -> None:
        """The step has ended: its tokens count from now on."""
        self._let_go()
        for sequence in self.sequences:
            sequence.tokens += self.new_tokens

    def roll_back(self) -> None:
        """The step has failed: return the pages that it took."""
        self._let_go()
        for sequence, tokens in zip(self.sequences, self.before, strict=True):
            sequence.keep(tokens)

    def _let_go(self) -> None:
        """Layers and cache refer to each other, so this object, and what it holds, lives until Python next collects."""
        self._latest = None


class GraphCache(Cache):
    """The same for a captured graph: a new token for each of a fixed number of rows, everything else on the device.

    Args:
        table: ``int32 [batch, pages]``.
        lengths: ``int32 [batch]``, tokens of each row with the new one.
        prefetch: brings the pages, where they are on the host.
    """

    def __init__(self, pool: KvPool, table: Tensor, lengths: Tensor, prefetch: HostPrefetch | None = None) -> None:
        self._pool, self._table, self._lengths, self._layer = pool, table, lengths, 0
        self._prefetch = prefetch
        super().__init__(layers=[PagedLayer(self, index) for index in range(pool.form.layers)])

    @property
    def longest(self) -> int:
        return 1

    def put(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._layer = layer
        paged_kernels.write(self._pool, layer, keys, values, self._table, self._lengths)
        if self._prefetch is not None:
            self._prefetch.write(layer, keys, values)
        return keys, values

    def attend(self, query: Tensor, scale: float) -> Tensor:
        if self._prefetch is not None:
            return self._prefetch.attend(self._layer, query, scale)
        return paged_kernels.attend(self._pool, self._layer, query, scale, self._table, self._lengths)

    def read(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a graph depends on no length: this model's attention cannot be captured")


class PagedLayer(CacheLayerMixin):
    """One layer of a `PagedCache` or `GraphCache`."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: PagedCache | GraphCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache, self._index = cache, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Pages are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._cache.put(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        cache = self._cache
        return cache.longest - (cache.new_tokens if isinstance(cache, PagedCache) else 1)

    def get_max_length(self) -> int:
        return -1
