"""A conversation's pages for a forward that only looks: it notes which keys its queries attend to, and writes none."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from autoglm_lab.memory.kv import paged_kernels
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS
from autoglm_lab.memory.kv.paged_cache import PagedCache, PagedLayer
from autoglm_lab.memory.kv.paged_sequence import PagedSequence


class ObservingCache(PagedCache):
    """Keys and values of one conversation in pages, and of the tokens that look at them beside these.

    Args:
        new_tokens: how many look.

    Attributes:
        scores: attention that each slot's key got, the mean over the queries and over the heads that share the key,
            ``float32 [layers, kv_heads, tokens]``.
    """

    def __init__(self, sequence: PagedSequence, new_tokens: int) -> None:
        self.pool, self.sequences, self.new_tokens, self.gathers = sequence.pool, [sequence], new_tokens, False
        self.before, self.longest = [sequence.tokens], sequence.tokens + new_tokens
        form, shares = self.pool.form, self.pool.shares
        pages = sequence.pages[: -(-sequence.tokens // PAGE_TOKENS)]
        self._tables = {share: torch.tensor([pages], device=share.device, dtype=torch.int32) for share in shares}
        self.scores = torch.zeros(form.layers, form.kv_heads, sequence.tokens, device=shares[0].device)
        self._kernels = all(paged_kernels.available(share) for share in shares)
        self._layer = 0
        self._both: tuple[Tensor, Tensor] | None = None
        Cache.__init__(self, layers=[PagedLayer(self, index) for index in range(form.layers)])

    def put(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take the keys and values of those that look, ``[1, kv_heads, new, head_dim]``, for this forward alone."""
        self._both = None  # the layer before
        tokens = self.before[0]
        share, within = self.pool.of(layer)
        if self._kernels:
            held = paged_kernels.read(share, within, self._tables[share], tokens)
        else:
            held = share.store.read(within, self._tables[share])
        joined = (torch.cat([old[:, :, :tokens], new], dim=2) for old, new in zip(held, (keys, values), strict=True))
        self._layer, self._both = layer, (next(joined), next(joined))
        return keys, values

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens of the layer under way, ``[1, kv_heads, tokens + new, head_dim]`` each."""
        assert self._both is not None
        return self._both

    def attend(self, query: Tensor, scale: float) -> Tensor | None:
        """None: the model's own attention goes on with what `read` gives."""
        del query, scale
        return None

    def observe(self, query: Tensor, scale: float) -> None:
        """Note what queries ``[1, heads, new, head_dim]`` of the layer under way attend to."""
        keys, _ = self.read()
        group, tokens = query.shape[1] // keys.shape[1], self.before[0]
        later = torch.ones(self.new_tokens, self.new_tokens, dtype=torch.bool, device=keys.device).triu(1)
        for head in range(keys.shape[1]):  # the weights of all heads at once would be the peak of a long conversation
            asked = query[0, head * group : (head + 1) * group]
            weights = (asked @ keys[0, head].transpose(0, 1)).float() * scale
            weights[..., tokens:].masked_fill_(later, float("-inf"))
            self.scores[self._layer, head] = weights.softmax(-1)[..., :tokens].mean((0, 1))

    def let_go(self) -> None:
        """The forward is over: hold the last layer's keys and values no longer."""
        self._both = None
