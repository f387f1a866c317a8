"""The choice of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from autoglm_lab.policy import GenerationPolicy

# Below this, logits divided by it overflow float32; the limit of ever lower temperatures is the greedy choice.
_GREEDY = 1e-5


class Chooser:
    """Chooses tokens as transformers' ``generate`` does with the same settings; ``temperature`` 0 is greedy."""

    def __init__(self, settings: GenerationPolicy, prompt_ids: Sequence[int], eos: Sequence[int], device: Any) -> None:
        self._sampled = settings.temperature >= _GREEDY
        self._ids = torch.tensor([list(prompt_ids)], device=device)
        self._processors = LogitsProcessorList()
        if settings.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if settings.frequency_penalty or settings.presence_penalty:
            self._processors.append(
                AnswerPenalty(len(prompt_ids), settings.frequency_penalty, settings.presence_penalty)
            )
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


class AnswerPenalty(LogitsProcessor):
    """Makes tokens that the answer already has less likely, as OpenAI's two penalties do; the prompt does not count.

    Args:
        prompt: tokens of the prompt.
        frequency: taken off a token's logit for each time that the answer has it.
        presence: taken off once where it has it at all.
    """

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self._prompt, self._frequency, self._presence = prompt, frequency, presence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Logits ``[batch, vocab]`` after ids ``[batch, seq]``."""
        answer = input_ids[:, self._prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        penalised = scores - self._frequency * counts - self._presence * (counts > 0)
        return cast("torch.FloatTensor", penalised)
