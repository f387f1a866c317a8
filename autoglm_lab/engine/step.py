"""One forward: a prefill of one conversation, or a decode step of a batch of them; and the choice of the next token.

A step either ends, and then its tokens are committed to the conversation's `KvState`, or it fails, and then the state
is as it was before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from autoglm_lab.engine.prompt import MediaRun, Prompt, reusable
from autoglm_lab.errors import ConversationError
from autoglm_lab.memory.kv_pool import PAGE_TOKENS, KvPool, PagedCache, PagedSequence
from autoglm_lab.memory.prefix_index import page_keys
from autoglm_lab.policy import GenerationPolicy


class KvState:
    """What is cached of one conversation: the tokens behind its keys and values, their blocks and media.

    The keys and values lie in pages of the pool, or in transformers' own cache where the layers cannot be paged.

    Args:
        pool: the pages; None for transformers' own cache.
    """

    def __init__(self, pool: KvPool | None = None) -> None:
        self.ids: list[int] = []
        self.blocks: list[int] | None = None
        self.runs: tuple[MediaRun, ...] = ()
        self.paged = None if pool is None else PagedSequence(pool)
        self.own: DynamicCache | None = None
        self.position_state: dict[int, Any] = {}

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
        if self.paged is not None:
            self.paged.keep(0)

    def keep(self, length: int) -> None:
        """Keep the first ``length`` tokens; the memory of the others is really freed."""
        if self.paged is not None:
            self.paged.keep(length)
        elif length == 0 or self.own is None or not _croppable(self.own):
            self.clear()
            return
        else:
            for layer in _growing_layers(self.own):
                if layer.keys is not None and layer.values is not None and layer.keys.shape[-2] != length:
                    layer.keys = layer.keys[..., :length, :].clone()
                    layer.values = layer.values[..., :length, :].clone()
        self.ids = self.ids[:length]
        self.blocks = None if self.blocks is None else self.blocks[:length]
        self.runs = tuple(run for run in self.runs if run.start < length)

    def begin(self, prompt: Prompt, *, share: bool = True) -> int:
        """Keep what ``prompt`` begins with, or hold it together with another conversation that began so.

        Returns:
            Leading tokens of ``prompt`` that need no prefill.
        """
        if self.position_state or (self.paged is None and (self.own is None or not _croppable(self.own))):
            self.clear()
            return 0
        length = reusable(prompt, self.ids, self.blocks, self.runs)
        if self.paged is not None and share:
            length = max(length, self._adopt(self.paged, prompt, length))
        self.keep(length)
        return length

    def publish(self) -> None:
        """Let other conversations find the full pages."""
        if self.paged is not None and not self.position_state:
            keys = page_keys(self.ids, self.blocks, [run.span for run in self.runs], PAGE_TOKENS)
            self.paged.pool.prefixes.add(keys, self.paged.pages[: len(keys)])

    def _adopt(self, paged: PagedSequence, prompt: Prompt, own: int) -> int:
        """Hold the pages of other conversations that begin as ``prompt``, where that is more than ``own`` tokens."""
        keys = page_keys(prompt.ids, prompt.blocks, [run.span for run in prompt.runs], PAGE_TOKENS)
        pages = paged.pool.prefixes.find(keys)
        held = len(pages) * PAGE_TOKENS
        blocks = None if prompt.blocks is None else prompt.blocks[:held]
        runs = [run for run in prompt.runs if run.start + run.length <= held]
        length = reusable(prompt, prompt.ids[:held], blocks, runs)
        if length <= own:
            return 0
        paged.adopt(pages)
        self.ids, self.runs = list(prompt.ids[:held]), tuple(runs)
        self.blocks = None if blocks is None else list(blocks)
        return length


class Stepper:
    """Runs a model one step at a time: the prefill of one prompt, or a token of each conversation of a batch."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        # Some families (Glm4v, Qwen-VL) keep the positions of the last conversation on a module.
        self._positioned = [module for module in model.modules() if hasattr(module, "rope_deltas")]

    @torch.no_grad()
    def prefill(self, state: KvState, prompt: Prompt, start: int) -> torch.Tensor:
        """Read ``prompt`` from token ``start`` on; what is before stands in ``state`` (see `KvState.begin`).

        Returns:
            Logits ``[vocab]`` after the last token, float32.
        """
        device = self._model.device
        arguments: dict[str, Any] = {name: value.to(device) for name, value in prompt.inputs_from(start).items()}
        arguments |= _live_audio(self._model, prompt, start, arguments)
        if prompt.blocks is not None:
            arguments["block_sequence_ids"] = torch.tensor([prompt.blocks], device=device)
        logits = self._one(state, prompt.ids[start:], arguments)
        state.blocks = None if prompt.blocks is None else [*prompt.blocks]
        state.runs = prompt.runs
        state.publish()
        return logits

    @torch.no_grad()
    def decode(self, states: Sequence[KvState], tokens: Sequence[int]) -> list[torch.Tensor]:
        """Read one generated token of each conversation, in one forward where the model allows it.

        Returns:
            Logits ``[vocab]`` for each conversation's next token, float32.

        Raises:
            ConversationError: an earlier step failed in a cache that cannot be rolled back, which was dropped then.
        """
        if not all(state.ids for state in states):
            raise ConversationError(
                "a step failed, and this model's cache cannot be taken back to before it: ask again"
            )
        if len(states) > 1 and not self._positioned and all(state.paged is not None for state in states):
            logits = self._batch(states, tokens)
        else:
            logits = [self._one(state, (token,), {}) for state, token in zip(states, tokens, strict=True)]
        for state in states:
            if state.blocks is not None:
                state.blocks.append(-1)
        return logits

    def _one(self, state: KvState, ids: Sequence[int], arguments: dict[str, Any]) -> torch.Tensor:
        before, device = len(state.ids), self._model.device
        for index, module in enumerate(self._positioned):
            module.rope_deltas = state.position_state.get(index)
        cache: Cache
        if state.paged is not None:
            cache = PagedCache([state.paged], len(ids))
        else:
            cache = state.own = DynamicCache(config=self._model.config) if state.own is None else state.own
        try:
            logits = self._forward(
                cache,
                input_ids=torch.tensor([list(ids)], device=device),
                attention_mask=torch.ones((1, before + len(ids)), dtype=torch.long, device=device),
                **arguments,
            )[0]
        except BaseException:
            state.keep(before)
            raise
        if isinstance(cache, PagedCache):
            cache.commit()
        states = [module.rope_deltas for module in self._positioned]
        state.position_state = {index: value for index, value in enumerate(states) if value is not None}
        state.ids.extend(ids)
        return logits

    def _batch(self, states: Sequence[KvState], tokens: Sequence[int]) -> list[torch.Tensor]:
        cache = PagedCache([state.paged for state in states if state.paged is not None], 1)
        implementation = self._model.config.get_text_config()._attn_implementation  # noqa: SLF001 - it has no public name
        try:
            logits = self._forward(
                cache,
                input_ids=torch.tensor(tokens, device=self._model.device)[:, None],
                attention_mask=cache.mask(self._model.dtype, additive=implementation == "eager"),
                position_ids=cache.positions,
            )
        except BaseException:
            cache.roll_back()
            raise
        cache.commit()
        for state, token in zip(states, tokens, strict=True):
            state.ids.append(token)
        return list(logits)

    def _forward(self, cache: Cache, **arguments: Any) -> torch.Tensor:
        """Logits ``[batch, vocab]`` after the last token of each row, float32."""
        if "logits_to_keep" in self._accepted:
            arguments["logits_to_keep"] = 1
        logits: torch.Tensor = self._model(past_key_values=cache, use_cache=True, **arguments).logits
        return logits[:, -1].float()


class Chooser:
    """Chooses tokens as transformers' ``generate`` does with the same settings; ``temperature`` 0 is greedy."""

    def __init__(self, settings: GenerationPolicy, prompt_ids: Sequence[int], eos: Sequence[int], device: Any) -> None:
        self._sampled = settings.temperature > 0
        self._ids = torch.tensor([list(prompt_ids)], device=device)
        self._processors = LogitsProcessorList()
        if settings.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if settings.min_new_tokens and eos:
            self._processors.append(
                MinNewTokensLengthLogitsProcessor(len(prompt_ids), settings.min_new_tokens, list(eos), device=device)
            )
        if self._sampled:
            if settings.temperature != 1.0:
                self._processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(settings.top_p))
        self._random = torch.Generator(device=device)
        if settings.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(settings.seed)

    @torch.no_grad()
    def choose(self, logits: torch.Tensor) -> int:
        """The next token from logits ``[vocab]``."""
        scores = logits[None]
        for processor in self._processors:
            scores = processor(self._ids, scores)
        if self._sampled:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._random)
        else:
            chosen = scores.argmax(-1, keepdim=True)
        self._ids = torch.cat([self._ids, chosen], dim=1)
        return int(chosen)


def _live_audio(model: Any, prompt: Prompt, start: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Features of the sounds from ``start`` on, in order, where some were encoded while they came in."""
    runs = prompt.runs_from(start, "audio")
    if not any(run.digest in prompt.live for run in runs):
        return {}
    features = arguments.pop("input_features")
    mask = arguments.pop("input_features_mask", None)
    parts = []
    for row, run in enumerate(runs):
        if run.digest in prompt.live:
            parts.append(prompt.live[run.digest])
        else:
            one = model.get_audio_features(features[row : row + 1], None if mask is None else mask[row : row + 1])
            parts.append(one.pooler_output)
    return {"mm_encoder_outputs": {"audio": BaseModelOutputWithPooling(pooler_output=torch.cat(parts))}}


def _growing_layers(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers that keep every token; sliding and recurrent ones, which forget, are left out."""
    return [layer for layer in cache.layers if type(layer) is DynamicLayer]


def _croppable(cache: DynamicCache) -> bool:
    return len(_growing_layers(cache)) == len(cache.layers)
