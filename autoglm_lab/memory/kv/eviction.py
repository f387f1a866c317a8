"""Which tokens a conversation can do without: those whose keys got the least attention from the latest queries.

Asking the last queries and pooling over neighbours follow SnapKV (Li, Huang, Yang and others 2024). Here they are asked
anew whenever room is needed, each layer and key head chooses for itself, and of a prompt longer than the limit the last
words are asked before each chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from autoglm_lab.errors import ContextLimitError
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS
from autoglm_lab.policy import KvPolicy

_NEIGHBOURS = 7
"""Tokens that share the highest attention among them: what is told goes with what was looked for."""
_TIES = 0.01
"""Share of a token's own attention that decides among neighbours."""
_LATEST = 4
"""Part of what stays that is the latest tokens, whatever attention they got."""
_CHUNKS = 4
"""Parts of the limit that a longer prompt is read by: smaller ones leave more of what was read before."""
_SLACK = 8
"""Part of the limit that is freed at once while an answer grows, so that few steps have to look."""


@dataclass(frozen=True)
class Eviction:
    """How a conversation is kept within a limit.

    Attributes:
        tokens: most that are kept.
        sinks: first tokens that stay, in whole pages.
        observation: latest tokens whose queries are asked.
    """

    tokens: int
    sinks: int
    observation: int

    def chunk(self, most: int, prompt: int) -> int:
        """Tokens of a prompt to read at once: at most ``most``, and few where all of it does not fit.

        What is kept beside the last chunk is what the answer can go by.
        """
        return most if prompt <= self.tokens else max(1, min(most, (self.tokens - self.sinks) // _CHUNKS))

    def split(self, new: int) -> tuple[int, int, int]:
        """How many of a conversation's tokens stay so that ``new`` more fit: first, chosen and latest ones.

        An answer that grows token by token gets room for many at once, so that few steps have to look.

        Raises:
            ContextLimitError: not even the first ones do.
        """
        first = -(-self.sinks // PAGE_TOKENS) * PAGE_TOKENS
        staying = self.tokens - (new if new > 1 else max(1, self.tokens // _SLACK))
        if staying < first:
            raise ContextLimitError(
                f"{new:,} tokens that must be read together do not fit a limit of {self.tokens:,} tokens beside "
                f"{first:,} that stay: raise kv.max_tokens, or lower kv.sinks or kv.chunk"
            )
        latest = (staying - first) // _LATEST
        return first, staying - first - latest, latest


def chunk_within(policy: KvPolicy, limit: int, prompt: int) -> int:
    """Tokens of a prompt to read at once, so that a limit has room for them beside those that stay."""
    if policy.overflow == "window":
        return max(1, min(policy.chunk, (limit - policy.sinks) // 2))
    if policy.overflow == "evict":
        return Eviction(limit, policy.sinks, policy.observation).chunk(policy.chunk, prompt)
    return policy.chunk


def chosen(scores: Tensor, first: int, count: int, latest: int) -> Tensor:
    """The slots that stay between the first ones and the latest, ``[layers, kv_heads, count]``, in order.

    Args:
        scores: attention that each slot's key got, ``float32 [layers, kv_heads, tokens]``.
    """
    middle = scores[..., first : scores.shape[-1] - latest]
    pooled = functional.max_pool1d(middle, _NEIGHBOURS, stride=1, padding=_NEIGHBOURS // 2)
    return pooled.add(middle, alpha=_TIES).topk(count, dim=-1).indices.sort(dim=-1).values + first
