"""One forward of one conversation: a prefill, or a decode step; and the choice of the next token.

A step either ends, and then its tokens are committed to the conversation's `KvState`, or it fails, and then the state
is as it was before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
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
from autoglm_lab.policy import GenerationPolicy


class KvState:
    """What a cache holds of one conversation: the tokens behind its keys and values, their blocks and media."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.blocks: list[int] | None = None
        self.runs: tuple[MediaRun, ...] = ()
        self.cache: DynamicCache | None = None
        self.position_state: dict[int, Any] = {}
        self.nbytes = 0

    def clear(self) -> None:
        """Forget everything; the keys and values go back to the allocator."""
        self.ids, self.blocks, self.runs, self.cache = [], None, (), None
        self.position_state, self.nbytes = {}, 0

    def keep(self, length: int) -> None:
        """Keep the first ``length`` tokens; their keys and values are copied, so that the rest is really freed."""
        if length == len(self.ids) and length == _cached_tokens(self.cache):
            return
        if length == 0 or self.cache is None or not _croppable(self.cache):
            self.clear()
            return
        for layer in _growing_layers(self.cache):
            if layer.keys is not None and layer.values is not None:
                layer.keys = layer.keys[..., :length, :].clone()
                layer.values = layer.values[..., :length, :].clone()
        self.ids = self.ids[:length]
        self.blocks = None if self.blocks is None else self.blocks[:length]
        self.runs = tuple(run for run in self.runs if run.start < length)
        self.measure()

    def measure(self) -> None:
        """Count the bytes of the keys and values."""
        layers: list[Any] = [] if self.cache is None else self.cache.layers
        tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)


def reusable_tokens(state: KvState, prompt: Prompt) -> int:
    """How many leading tokens of ``prompt`` need no prefill."""
    if state.cache is None or state.position_state or not _croppable(state.cache):
        return 0
    return reusable(prompt, state.ids, state.blocks, state.runs)


class Stepper:
    """Runs a model one step at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        # Some families (Glm4v, Qwen-VL) keep the positions of the last conversation on a module.
        self._positioned = [module for module in model.modules() if hasattr(module, "rope_deltas")]

    @torch.no_grad()
    def prefill(self, state: KvState, prompt: Prompt, start: int) -> torch.Tensor:
        """Read ``prompt`` from token ``start`` on; what is before stands in ``state``.

        Returns:
            Logits ``[vocab]`` after the last token, float32.
        """
        state.keep(start)
        if state.cache is None:
            state.cache = DynamicCache(config=self._model.config)
        device = self._model.device
        arguments: dict[str, Any] = {name: value.to(device) for name, value in prompt.inputs_from(start).items()}
        arguments |= _live_audio(self._model, prompt, start, arguments)
        if prompt.blocks is not None:
            arguments["block_sequence_ids"] = torch.tensor([prompt.blocks], device=device)
        logits = self._forward(state, prompt.ids[start:], arguments)
        state.blocks = None if prompt.blocks is None else [*prompt.blocks]
        state.runs = prompt.runs
        return logits

    @torch.no_grad()
    def decode(self, state: KvState, token: int) -> torch.Tensor:
        """Read one generated token.

        Returns:
            Logits ``[vocab]`` for the next one, float32.
        """
        logits = self._forward(state, (token,), {})
        if state.blocks is not None:
            state.blocks.append(-1)
        return logits

    def _forward(self, state: KvState, ids: Sequence[int], arguments: dict[str, Any]) -> torch.Tensor:
        before, device = len(state.ids), self._model.device
        if "logits_to_keep" in self._accepted:
            arguments["logits_to_keep"] = 1
        for index, module in enumerate(self._positioned):
            module.rope_deltas = state.position_state.get(index)
        try:
            outputs = self._model(
                input_ids=torch.tensor([list(ids)], device=device),
                attention_mask=torch.ones((1, before + len(ids)), dtype=torch.long, device=device),
                past_key_values=state.cache,
                use_cache=True,
                **arguments,
            )
            logits: torch.Tensor = outputs.logits[0, -1].float()
        except BaseException:
            state.keep(before)
            raise
        state.position_state = {
            index: module.rope_deltas for index, module in enumerate(self._positioned) if module.rope_deltas is not None
        }
        state.ids.extend(ids)
        state.measure()
        return logits


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


def _cached_tokens(cache: DynamicCache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
