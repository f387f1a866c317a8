"""What is cached of one conversation: the tokens behind its keys and values, and where those lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from autoglm_lab.engine.prompt import MediaRun, Prompt, reusable
from autoglm_lab.engine.question import Question
from autoglm_lab.errors import ContextLimitError, OutOfMemoryError
from autoglm_lab.memory.kv.eviction import Eviction, chosen
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS
from autoglm_lab.memory.kv.page_keys import page_keys
from autoglm_lab.memory.kv.paged_sequence import PagedSequence
from autoglm_lab.policy import KvPolicy


class KvState:
    """What is cached of one conversation: the tokens behind its keys and values, their blocks and media.

    The keys and values lie in pages of the pool, or in transformers' own cache where the layers cannot be paged.

    Args:
        pool: the pages; None for transformers' own cache.

    Attributes:
        ids: every token that was read, those included that were forgotten since.
        delta: what the next token's position has above the count of tokens.
        window: most tokens kept and first tokens that stay, where older ones are forgotten on the way; None: all stay.
        eviction: the same, where those are forgotten that got the least attention; None: all stay.
        question: the last words of the prompt that was read, for an eviction to ask.
        position_state: what the model itself keeps of the positions, where it cannot be told them.
    """

    def __init__(self, pool: KvPool | None = None) -> None:
        self.ids: list[int] = []
        self.blocks: list[int] | None = None
        self.runs: tuple[MediaRun, ...] = ()
        self.paged = None if pool is None else PagedSequence(pool)
        self.own: DynamicCache | None = None
        self.delta = 0
        self.window: tuple[int, int] | None = None
        self.eviction: Eviction | None = None
        self.question: Question | None = None
        self.position_state: dict[int, Any] = {}
        self._keys: list[bytes] = []

    @property
    def held(self) -> int:
        """Tokens whose keys and values are there."""
        return len(self.ids) if self.paged is None else self.paged.tokens

    @property
    def forgotten(self) -> tuple[int, int]:
        """The span ``(first, last + 1)`` of which tokens were forgotten; empty where none were.

        A window has forgotten all of it, an eviction some, others for each layer and head.
        """
        if self.paged is None or self.paged.first is None:
            return 0, 0
        return self.paged.first, len(self.ids) - self.held + self.paged.latest

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        if self.paged is not None:
            return self.paged.nbytes
        layers: list[Any] = [] if self.own is None else self.own.layers
        tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def own_nbytes(self) -> int:
        """Bytes of the keys and values that no other conversation holds too."""
        return self.nbytes if self.paged is None else self.paged.own_nbytes

    def clear(self) -> None:
        """Forget everything; the keys and values are given back."""
        self.ids, self.blocks, self.runs, self.own, self.position_state = [], None, (), None, {}
        self._keys = []
        self.delta, self.question = 0, None
        if self.paged is not None:
            self.paged.keep(0)

    def keep(self, length: int) -> None:
        """Keep the first ``length`` tokens, fewer where some were forgotten; the others' memory is really freed."""
        if self.paged is not None:
            first, last = self.forgotten
            missing = len(self.ids) - self.held if length >= last else 0
            length = length if length >= last else min(length, first)
            self.paged.keep(length - missing)
        elif length == 0 or self.own is None or not _croppable(self.own):
            self.clear()
            return
        else:
            for layer in _growing_layers(self.own):
                if layer.keys is not None and layer.values is not None and layer.keys.shape[-2] != length:
                    layer.keys = layer.keys[..., :length, :].clone()
                    layer.values = layer.values[..., :length, :].clone()
        self.ids = self.ids[:length]
        del self._keys[length // PAGE_TOKENS :]
        self.blocks = None if self.blocks is None else self.blocks[:length]
        self.runs = tuple(run for run in self.runs if run.start < length)

    def begin(self, prompt: Prompt, *, share: bool = True) -> int:
        """Keep what ``prompt`` begins with, or hold what is stored of it: of other conversations, or of earlier ones.

        Returns:
            Leading tokens of ``prompt`` that need no prefill.
        """
        if self.position_state or (self.paged is None and (self.own is None or not _croppable(self.own))):
            if self._goes_on(prompt):
                return len(self.ids)
            self.clear()
            return 0
        length = reusable(prompt, self.ids, self.blocks, self.runs)
        first, last = self.forgotten
        if length < last:
            length = reusable(prompt, self.ids[:first], None if self.blocks is None else self.blocks[:first], self.runs)
        if self.paged is not None and share:
            length = max(length, self._adopt(self.paged, prompt, length))
        self.keep(length)
        return length

    def _goes_on(self, prompt: Prompt) -> bool:
        """Whether sliding layers, which cannot go back, need not: the prompt begins with all that they have read."""
        kinds = (DynamicLayer, DynamicSlidingWindowLayer)
        if self.position_state or self.own is None or any(type(layer) not in kinds for layer in self.own.layers):
            return False
        return 0 < len(self.ids) == reusable(prompt, self.ids, self.blocks, self.runs)

    @property
    def forgets(self) -> bool:
        """Whether it may grow beyond a limit, some of its tokens being forgotten."""
        return self.window is not None or self.eviction is not None

    def chunk(self, most: int, prompt: int) -> int:
        """Tokens of a prompt to read at once: at most ``most``, and few enough for a limit beside those that stay."""
        if self.window is not None:
            tokens, sinks = self.window
            return max(1, min(most, (tokens - sinks) // 2))
        return most if self.eviction is None else self.eviction.chunk(most, prompt)

    def forget_beyond(self, limit: int | None, policy: KvPolicy) -> bool:
        """Obey the policy's overflow from now on, where it forgets tokens beyond a limit and the pages allow it.

        Returns:
            Whether it does: the conversation may then grow beyond ``limit``.
        """
        self.window = self.eviction = None
        if limit is None or self.paged is None:
            return False
        if policy.overflow == "window":
            self.window = limit, policy.sinks
        elif policy.overflow == "evict":
            self.eviction = Eviction(limit, policy.sinks, policy.observation)
        return self.forgets

    def make_room(self, new: int) -> None:
        """Forget tokens between the first ones that stay and the latest, so that ``new`` more fit into the window.

        Raises:
            ContextLimitError: they do not fit beside the first ones.
        """
        if self.window is None or self.paged is None:
            return
        most, sinks = self.window
        over = self.paged.tokens + new - most
        if over > 0 and not self.paged.forget(over, sinks):
            raise ContextLimitError(
                f"{new:,} tokens that must be read together do not fit a window of {most:,} tokens beside {sinks:,} "
                "that stay: raise kv.max_tokens, or lower kv.sinks or kv.chunk"
            )

    def over(self, new: int) -> bool:
        """Whether some tokens have to be evicted before ``new`` more are read."""
        return self.eviction is not None and self.paged is not None and self.held + new > self.eviction.tokens

    def evict(self, scores: Tensor, new: int) -> None:
        """Forget the tokens that got the least attention, so that ``new`` more fit into the limit.

        Args:
            scores: as `chosen` takes them.

        Raises:
            ContextLimitError: they do not fit beside the first ones.
            OutOfMemoryError: there is no room for pages that other conversations hold too.
        """
        assert self.paged is not None
        assert self.eviction is not None
        first, count, latest = self.eviction.split(new)
        try:
            self.paged.evict(chosen(scores, first, count, latest), first, latest)
        except OutOfMemoryError:
            raise  # before anything was moved
        except BaseException:
            self.clear()  # some layers were moved, others not
            raise

    def without_forgotten(self, values: Sequence[int]) -> list[int]:
        """``values``, one a token, without as many as tokens were forgotten: one for each that is held or new."""
        first, _ = self.forgotten
        return [*values[:first], *values[first + len(self.ids) - self.held :]]

    def publish(self) -> None:
        """Let other conversations find the full pages."""
        if self.paged is not None and not self.position_state:
            first, last = self.forgotten
            exact = len(self.ids) if first == last else first  # what came later has not seen all that its key covers
            media = [run.span for run in self.runs]
            keys = page_keys(self.ids, self.blocks, media, PAGE_TOKENS, self._keys)[: exact // PAGE_TOKENS]
            self.paged.pages[: len(keys)] = self.paged.pool.prefixes.add(keys, self.paged.pages[: len(keys)])
            self._keys = keys

    def _adopt(self, paged: PagedSequence, prompt: Prompt, own: int) -> int:
        """Hold the stored pages of what ``prompt`` begins with, where that is more than ``own`` tokens."""
        media, known = [run.span for run in prompt.runs], self._keys[: own // PAGE_TOKENS]
        keys = page_keys(prompt.ids, prompt.blocks, media, PAGE_TOKENS, known)
        held = paged.pool.prefixes.match(keys) * PAGE_TOKENS
        blocks = None if prompt.blocks is None else prompt.blocks[:held]
        runs = [run for run in prompt.runs if run.start + run.length <= held]
        length = reusable(prompt, prompt.ids[:held], blocks, runs)
        if length <= own:
            return 0
        keys = keys[: -(-length // PAGE_TOKENS)]
        paged.adopt(paged.pool.prefixes.hold(keys))
        self._keys = keys
        self.ids, self.runs = list(prompt.ids[: paged.tokens]), tuple(runs)
        self.blocks = None if blocks is None else list(blocks[: paged.tokens])
        return length


def _growing_layers(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers that keep every token; sliding and recurrent ones, which forget, are left out."""
    return [layer for layer in cache.layers if type(layer) is DynamicLayer]


def _croppable(cache: DynamicCache) -> bool:
    return len(_growing_layers(cache)) == len(cache.layers)
