"""The choice of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from autoglm_lab.policy import GenerationPolicy


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
