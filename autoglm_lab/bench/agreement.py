"""How far a setting moves the distribution of the next token, along what the model itself answers to dialogues.

Answers that are right or wrong say little of small differences: a few dialogues of hundreds change at all. Every token
of an answer tells more, and needs no text that the model was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autoglm_lab.bench.heldout import Recipe
from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.messages import read_messages
from autoglm_lab.engine.prompt import Prompt, render
from autoglm_lab.workbench import Workbench

_LONGEST_ANSWER = 96


@dataclass(frozen=True)
class Reading:
    """A dialogue with the model's own greedy answer, and its log-probabilities before each token of that.

    Attributes:
        prompt: the dialogue and the answer but for its last token.
        answer: tokens of the answer.
        expected: ``[answer, vocab]``.
    """

    prompt: Prompt
    answer: int
    expected: Tensor


@dataclass(frozen=True)
class Agreement:
    """How near the distributions are, over all tokens of the answers.

    Attributes:
        top1: tokens whose likeliest is the same, in %.
        divergence: Kullback and Leibler's, of the model's own from what it is now, in nats: the mean over tokens.
        interval: its 95 % interval: 1.96 standard errors over the dialogues.
        tokens: how many there were.
    """

    top1: float
    divergence: float
    interval: tuple[float, float]
    tokens: int


def readings(workbench: Workbench, recipe: Recipe, dialogues: Sequence[Any]) -> list[Reading]:
    """What a model answers greedily, and how sure it is. No turn may be under way."""
    found = []
    for dialogue in dialogues:
        messages = read_messages(recipe.messages(dialogue))
        prompt = render(workbench.model, workbench.processor, messages, thinking=dialogue.thinking)
        answer = _greedy(workbench, prompt)
        told = _with(prompt, answer[:-1])
        found.append(Reading(told, len(answer), _distributions(workbench, told, len(answer))))
    return found


def agreement(workbench: Workbench, read: Sequence[Reading]) -> Agreement:
    """How near a model under other settings comes to what was read. No turn may be under way."""
    same, apart = 0, []
    for one in read:
        now = _distributions(workbench, one.prompt, one.answer)
        same += int((now.argmax(-1) == one.expected.argmax(-1)).sum())
        apart.append((one.expected.exp() * (one.expected - now)).sum(-1))
    tokens = sum(len(one) for one in apart)
    mean = float(torch.cat(apart).mean())
    beyond = torch.stack([(one - mean).sum() for one in apart])  # a dialogue's tokens are not independent
    error = 1.96 * float(beyond.square().sum().sqrt()) / tokens if len(apart) > 1 else math.inf
    return Agreement(100 * same / tokens, mean, (mean - error, mean + error), tokens)


@torch.no_grad()
def _greedy(workbench: Workbench, prompt: Prompt) -> list[int]:
    state = workbench.engine.state
    kept = KvState(state.pool)
    ends = _ends(workbench.model)
    try:
        logits = state.stepper.prefill(kept, prompt, 0, chunk=state.policy.kv.chunk)
        assert logits is not None
        ids = [int(logits.argmax())]
        while ids[-1] not in ends and len(ids) < _LONGEST_ANSWER:
            ids.append(int(state.stepper.decode([kept], [ids[-1]])[0].argmax()))
    finally:
        kept.clear()
    return ids


@torch.no_grad()
def _distributions(workbench: Workbench, prompt: Prompt, count: int) -> Tensor:
    """Log-probabilities ``[count, vocab]`` after each of a prompt's last tokens, in float64."""
    state, model = workbench.engine.state, workbench.model
    kept, hidden = KvState(state.pool), []
    decoder = model.get_decoder()
    hook = decoder.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state[0]))
    try:
        state.stepper.prefill(kept, prompt, 0, chunk=state.policy.kv.chunk)
    finally:
        hook.remove()
        kept.clear()
    logits: Tensor = model.get_output_embeddings()(torch.cat(hidden)[-count:])
    return logits.double().log_softmax(-1).cpu()


def _with(prompt: Prompt, answer: Sequence[int]) -> Prompt:
    """A prompt with tokens of the answer behind it, which see what is before them alone."""
    blocks = None if prompt.blocks is None else (*prompt.blocks, *(-1 for _ in answer))
    return replace(prompt, ids=(*prompt.ids, *answer), blocks=blocks)


def _ends(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])
