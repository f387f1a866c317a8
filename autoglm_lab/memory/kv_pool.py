"""Keys and values in pages: one pool for a model, so that conversations of any length decode together without padding.

A page holds `PAGE_TOKENS` tokens of every layer. A conversation owns pages, in order; its keys and values are gathered
from them for attention. A turn's tokens are committed only when its step has ended, so a step that fails half-way
through the layers leaves nothing behind.
"""

from __future__ import annotations

import heapq
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.page_region import CudaPageRegion, HostPageRegion, PageRegion
from autoglm_lab.memory.prefix_index import PrefixIndex

PAGE_TOKENS = 16


@dataclass(frozen=True)
class PageShape:
    """What a page holds: keys and values ``[layers, 2, PAGE_TOKENS, kv_heads, head_dim]``."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.layers * 2 * PAGE_TOKENS * self.kv_heads * self.head_dim * self.dtype.itemsize

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype) -> PageShape | None:
        """The pages of a model; None where a layer keeps anything else than every token's keys and values."""
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        own = DynamicCache(config=config)
        growing = all(type(layer) is DynamicLayer for layer in own.layers)
        # Latent attention (DeepSeek's) keeps keys and values of different widths.
        if not growing or heads is None or hasattr(text, "kv_lora_rank"):
            return None
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
            return None
        return cls(text.num_hidden_layers, kv_heads, head_dim, dtype)


class KvPool:
    """The pages of one model on one device. Only the engine's thread takes and returns them."""

    def __init__(self, shape: PageShape, accelerator: Accelerator) -> None:
        self.shape, self._accelerator = shape, accelerator
        self._device = accelerator.device
        # Rows of the GPU's memory are read 512 bytes at a time; the kernel gives the host's back in pages of its own.
        grain = 512 if accelerator.kind == "cuda" else mmap.PAGESIZE
        self._stride = -(-shape.nbytes // grain) * grain
        pages = max(1, accelerator.total // self._stride)
        self._region: PageRegion
        if accelerator.kind == "cuda":
            self._region = CudaPageRegion(pages * self._stride, accelerator.device)
        else:
            self._region = HostPageRegion(pages * self._stride, chunk=self._stride)
            pages = self._region.bytes.numel() // self._stride
        self._free: list[int] = []
        self._fresh, self._pages = 0, pages
        self._users: dict[int, int] = {}
        self._holders: dict[int, int] = {}
        self.prefixes = PrefixIndex()
        self._closed = False
        values = self._region.bytes[: pages * self._stride].view(shape.dtype)
        per_token = shape.kv_heads * shape.head_dim
        per_layer = PAGE_TOKENS * per_token
        self._store = values.as_strided(
            (pages, shape.layers, 2, PAGE_TOKENS, shape.kv_heads, shape.head_dim),
            (self._stride // shape.dtype.itemsize, 2 * per_layer, per_layer, per_token, shape.head_dim, 1),
        )

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
        """``count`` pages.

        Raises:
            OutOfMemoryError: the device or the budget has no room; nothing was taken.
        """
        wanted = count * self._stride
        had = self._accelerator.headroom() + max(0, self.backed - self.used_pages * self._stride)
        if count and (wanted > had or count > self._pages - self.used_pages):
            raise OutOfMemoryError("KV cache", wanted, had)
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
        """Let one more conversation hold ``pages``, which are in use."""
        for page in pages:
            self._holders[page] += 1

    def put(self, pages: Iterable[int]) -> None:
        """Let a conversation's pages go; those that no other holds are free.

        On a CPU their memory goes back to the system at once, on CUDA with `trim`.
        """
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            self.prefixes.forget(page)
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
        self._store[own].copy_(self._store[page])
        return own

    def trim(self) -> int:
        """Give the memory of unused pages back to the system. Returns bytes."""
        idle = [chunk for chunk, users in self._users.items() if not users]
        if idle and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for chunk in idle:
            self._region.give_back(chunk)
            del self._users[chunk]
        self._count(-len(idle))
        return len(idle) * self._region.chunk

    def layer(self, index: int) -> Tensor:
        """Keys and values of one layer: ``[pages, 2, PAGE_TOKENS, kv_heads, head_dim]``."""
        return self._store[:, index]

    def holdings(self) -> Iterable[Row]:
        shared = sum(holders > 1 for holders in tuple(self._holders.values()))
        if shared:
            counts = f"{shared * PAGE_TOKENS:,} tokens that several conversations begin with, stored once"
            yield Row("KV shared prefixes", "kv", "device", shared * self._stride, counts)
        idle = self.backed - self.used_pages * self._stride
        if idle > 0:
            yield Row("KV pages, unused", "kv", "device", idle, "pages that no conversation holds, kept for the next")

    def close(self) -> None:
        """Give everything back; again is no harm. The pool cannot be used afterwards."""
        if self._closed:
            return
        self._closed = True
        self._count(-len(self._users))
        self._users.clear()
        del self._store
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
        if chunks:
            self._accelerator.hold(chunks * self._region.chunk)


class PagedSequence:
    """The keys and values of one conversation: its pages, in order."""

    def __init__(self, pool: KvPool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its pages, those included that others hold too."""
        return len(self.pages) * self.pool.page_bytes

    @property
    def own_nbytes(self) -> int:
        """Bytes of the pages that it alone holds."""
        return sum(self.pool.holders(page) == 1 for page in tuple(self.pages)) * self.pool.page_bytes

    def reserve(self, tokens: int) -> None:
        """Take pages for ``tokens`` more tokens. Raises `OutOfMemoryError`; nothing was taken then."""
        needed = -(-(self.tokens + tokens) // PAGE_TOKENS) - len(self.pages)
        if needed > 0:
            self.pages += self.pool.take(needed)

    def keep(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens and let the pages behind them go.

        A page that is cut while others hold it is copied first, since the next tokens are written into it. Raises
        `OutOfMemoryError` where there is no room for the copy; everything is as before then.
        """
        kept = -(-tokens // PAGE_TOKENS)
        if tokens % PAGE_TOKENS:
            cut = self.pages[kept - 1]
            if self.pool.holders(cut) > 1:
                self.pages[kept - 1] = self.pool.copy(cut)
                self.pool.put([cut])
            else:
                self.pool.prefixes.forget(cut)
        self.pool.put(self.pages[kept:])
        self.pages, self.tokens = self.pages[:kept], tokens

    def adopt(self, pages: Sequence[int]) -> None:
        """Begin anew with full pages of other conversations, held by them too."""
        self.pool.share(pages)
        self.pool.put(self.pages)
        self.pages, self.tokens = list(pages), len(pages) * PAGE_TOKENS


class PagedCache(Cache):
    """The caches of one step's sequences, as a transformers model takes them: ``past_key_values`` of a batch.

    Each row of the batch is a sequence; every row reads the same number of new tokens. Attention sees, for row b, its
    tokens and then the new ones; shorter rows are padded at the end, which `mask` hides.
    """

    def __init__(self, sequences: Sequence[PagedSequence], new_tokens: int) -> None:
        pool = sequences[0].pool
        self.sequences, self.new_tokens = sequences, new_tokens
        for sequence in sequences:
            sequence.reserve(new_tokens)
        device = pool.layer(0).device
        self.before = [sequence.tokens for sequence in sequences]
        self.longest = max(self.before) + new_tokens
        width = -(-self.longest // PAGE_TOKENS)
        table = [
            [*sequence.pages[:width], *[sequence.pages[0]] * (width - len(sequence.pages))] for sequence in sequences
        ]
        self.table = torch.tensor(table, device=device)
        places = torch.tensor(self.before, device=device)[:, None] + torch.arange(new_tokens, device=device)
        self.positions = places
        self.new_pages = self.table.gather(1, places // PAGE_TOKENS)
        self.new_slots = places % PAGE_TOKENS
        super().__init__(layers=[_PagedLayer(self, pool.layer(index)) for index in range(pool.shape.layers)])

    def mask(self, dtype: torch.dtype, *, additive: bool) -> Tensor | None:
        """What each row's single new token may see: ``[batch, 1, 1, longest]``; None where no row is padded."""
        if len(set(self.before)) == 1:
            return None
        ends = torch.tensor(self.before, device=self.table.device)[:, None] + 1
        seen = (torch.arange(self.longest, device=self.table.device)[None] < ends)[:, None, None]
        if not additive:
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def commit(self) -> None:
        """The step has ended: its tokens count from now on."""
        for sequence in self.sequences:
            sequence.tokens += self.new_tokens

    def roll_back(self) -> None:
        """The step has failed: return the pages that it took."""
        for sequence, tokens in zip(self.sequences, self.before, strict=True):
            sequence.keep(tokens)


class _PagedLayer(CacheLayerMixin):
    """One layer of a `PagedCache`."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: PagedCache, store: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache, self._store = cache, store
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Pages are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values ``[batch, kv_heads, new, head_dim]``; all of them, ``[…, longest, …]``."""
        cache, store = self._cache, self._store
        store[cache.new_pages, 0, cache.new_slots] = key_states.transpose(1, 2).to(store.dtype)
        store[cache.new_pages, 1, cache.new_slots] = value_states.transpose(1, 2).to(store.dtype)
        # [batch, pages, 2, PAGE_TOKENS, kv_heads, head_dim] -> twice [batch, kv_heads, longest, head_dim]
        gathered = store[cache.table]
        keys, values = (gathered[:, :, part].flatten(1, 2)[:, : cache.longest].transpose(1, 2) for part in (0, 1))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(self._cache.before) + query_length, 0

    def get_seq_length(self) -> int:
        return max(self._cache.before)

    def get_max_length(self) -> int:
        return -1
