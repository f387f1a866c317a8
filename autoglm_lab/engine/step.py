"""One forward: a prefill of one conversation, or a decode step of a batch of them.

A step either ends, and then its tokens are committed to the conversation's `KvState`, or it fails, and then the state
is as it was before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.prompt import Prompt
from autoglm_lab.errors import ConversationError
from autoglm_lab.memory.kv_pool import PagedCache


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
