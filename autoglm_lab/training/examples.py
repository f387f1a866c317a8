"""Dialogues as the model learns them: the prompt rendered exactly as for an answer, then the answer's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from autoglm_lab.engine.encoder import Encoder
from autoglm_lab.engine.messages import Message
from autoglm_lab.engine.positions import Positions
from autoglm_lab.engine.prompt import Prompt, render
from autoglm_lab.errors import DatasetError
from autoglm_lab.training.feature_cache import FeatureCache

IGNORED = -100
_SIZES = ("image_grid_thw", "image_sizes")


@dataclass(frozen=True, eq=False)
class Example:
    """One dialogue to learn.

    Attributes:
        prompt: all but the last answer, as it is rendered for one.
        answer: tokens of the last answer, its end included.
        learnt: labels of the prompt's tokens, `IGNORED` where nothing is learnt, ``[prompt]``.
        positions: ``[seq]`` or ``[3, seq]``; None: the model counts.
        media: what the encoders gave, by kind, as the model takes it; None: the model runs them on the prompt's inputs.
        kept: the model answers this already.
    """

    prompt: Prompt
    answer: tuple[int, ...]
    learnt: tuple[int, ...]
    positions: Tensor | None = None
    media: dict[str, Any] | None = None
    kept: bool = False

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.answer)

    @property
    def targets(self) -> int:
        """Tokens that count in the loss."""
        return len(self.answer) + sum(label != IGNORED for label in self.learnt)


class Examples:
    """Turns dialogues into examples and examples into what the model's forward takes.

    Args:
        model: with the processor that came with it.
        features: keeps what the encoders give, by content; None: pixels and sounds go to the model itself.
        all_answers: learn every answer of a dialogue, not only the last.
    """

    def __init__(self, model: Any, processor: Any, features: FeatureCache | None, *, all_answers: bool = False) -> None:
        self._model, self.processor, self._all = model, processor, all_answers
        self._features, self._encoder = features, Encoder(model, features)
        self._positions = Positions(model)

    def example(self, messages: Sequence[Message]) -> Example:
        """The example of one dialogue, whose last message is the answer."""
        thought, answer = _thought_and_answer(messages[-1].text)
        prompt = render(self._model, self.processor, messages[:-1], thinking=thought is not None)
        tokens = tuple(self._answer(answer, thought))
        learnt = [IGNORED] * len(prompt.ids)
        if self._all:
            self._learn_earlier(learnt, prompt, messages[:-1])
        places, media = self._places(prompt, len(tokens)), self._encoded(prompt)
        if media is not None:
            sizes = {name: value for name, value in prompt.inputs.items() if name in _SIZES}
            prompt = replace(prompt, inputs=sizes)  # pixels and sounds have done their part
        return Example(prompt, tokens, tuple(learnt), places, media)

    def batch(self, examples: Sequence[Example], device: torch.device) -> dict[str, Any]:
        """What the forward takes, padded on the right, and ``labels`` ``[batch, seq]``, not shifted."""
        rows = [torch.tensor([*one.prompt.ids, *one.answer]) for one in examples]
        labels = [torch.tensor([*one.learnt, *one.answer]) for one in examples]
        given: dict[str, Any] = {
            "input_ids": _padded(rows, 0).to(device),
            "attention_mask": _padded([torch.ones_like(row) for row in rows], 0).to(device),
            "labels": _padded(labels, IGNORED).to(device),
        }
        if examples[0].prompt.blocks is not None:
            blocks = [torch.tensor([*(one.prompt.blocks or ()), *[-1] * len(one.answer)]) for one in examples]
            given["block_sequence_ids"] = _padded(blocks, -1).to(device)
        places = [one.positions for one in examples]
        if all(one is not None for one in places):
            found = [one.transpose(0, -1) for one in places if one is not None]  # [seq] or [seq, 3]
            given["position_ids"] = (
                _padded(found, 0).movedim(-1, 0).to(device) if found[0].ndim > 1 else _padded(found, 0).to(device)
            )
        return given | _media(examples, device)

    def of_tokens(self, ids: Sequence[int]) -> Example:
        """The example of tokens that are all learnt, each from those before it."""
        prompt = Prompt(ids=tuple(ids[:1]), blocks=None, runs=())
        answer = tuple(ids[1:])
        return Example(prompt, answer, (IGNORED,), self._places(prompt, len(answer)))

    @torch.no_grad()
    def _encoded(self, prompt: Prompt) -> dict[str, Any] | None:
        """The encoders' outputs for a prompt by kind, on the host; None where the model itself has to run them."""
        if self._features is None or not prompt.runs or not self._encoder.separate(prompt, 0):
            return None
        if self._encoder.encode(prompt, 0) is None:
            return None
        kept = self._encoder.encode(prompt, 0)  # now from the host
        assert kept is not None
        given = self._encoder.arguments(prompt, kept, 0, len(prompt.ids))["mm_encoder_outputs"]
        return {kind: output.pooler_output for kind, output in given.items()}

    def _answer(self, answer: str, thought: str | None) -> Sequence[int]:
        if hasattr(self.processor, "encode_answer"):
            encoded: list[int] = self.processor.encode_answer(answer, thought)
            return encoded
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        text = answer if thought is None else f"<think>{thought}</think><answer>{answer}</answer>"
        end = tokenizer.eos_token_id
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]

    def _learn_earlier(self, learnt: list[int], prompt: Prompt, messages: Sequence[Message]) -> None:
        """Label the earlier answers, where the prompt shows them just as the model would have written them.

        Without a token at their end they could be a part of what the user said: then only what comes once is taken.
        """
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        ended = tokenizer.eos_token_id is not None
        ids, at = list(prompt.ids), 0
        for message in messages:
            if message.role != "assistant":
                continue
            tokens = list(self._answer(_thought_and_answer(message.text)[1], None))
            last = len(ids) - len(tokens)
            found = [place for place in range(at, last + 1) if ids[place : place + len(tokens)] == tokens]
            if found and (ended or len(found) == 1):
                at = found[0] + len(tokens)
                learnt[found[0] : at] = tokens

    def _places(self, prompt: Prompt, more: int) -> Tensor | None:
        places = self._positions.of(prompt) if self._positions.stated else None
        if places is None:
            return None
        after = torch.arange(len(prompt.ids), len(prompt.ids) + more) + places.delta
        ids = places.ids[..., 0, :]
        return torch.cat([ids, after.expand(*ids.shape[:-1], more)], -1)


def _media(examples: Sequence[Example], device: torch.device) -> dict[str, Any]:
    """What stands for the images and sounds of a batch: outputs of the encoders, or their inputs."""
    encoded: dict[str, list[Any]] = {}
    inputs: dict[str, list[Tensor]] = {}
    for one in examples:
        for kind, output in (one.media or {}).items():
            encoded.setdefault(kind, []).append(output)
        for name, value in one.prompt.inputs.items():
            inputs.setdefault(name, []).append(value)
    given: dict[str, Any] = {name: torch.cat(_same_length(values)).to(device) for name, values in inputs.items()}
    if encoded:
        given["mm_encoder_outputs"] = {kind: _joined(outputs, device) for kind, outputs in encoded.items()}
    return given


def _joined(outputs: Sequence[Any], device: torch.device) -> BaseModelOutputWithPooling:
    """Features ``[tokens, hidden]``, or tuples of them by image, of all examples of a batch."""
    if isinstance(outputs[0], tuple):
        pooled: Any = tuple(one.to(device) for output in outputs for one in output)
    else:
        pooled = torch.cat(list(outputs)).to(device)
    return BaseModelOutputWithPooling(pooler_output=pooled)


def check_length(example: Example, limit: int | None, line: int) -> None:
    """Raise `DatasetError` where an example is longer than ``limit`` tokens."""
    if limit is not None and len(example) > limit:
        raise DatasetError(
            f"line {line}: the dialogue has {len(example):,} tokens, the limit is {limit:,}: shorten it, "
            "or raise max_tokens"
        )


def _thought_and_answer(text: str) -> tuple[str | None, str]:
    thought, closed, rest = text.rpartition("</think>")
    answer = rest.split("<answer>")[-1].split("</answer>")[0]
    return (thought.partition("<think>")[2].strip() or None) if closed else None, answer


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)


def _same_length(values: Sequence[Tensor]) -> list[Tensor]:
    """Sounds of one batch, padded with silence to the longest."""
    if values[0].ndim < 2 or len({value.shape[1:] for value in values}) == 1:
        return list(values)
    longest = max(value.shape[1] for value in values)
    padding = [[0, 0] * (value.ndim - 2) + [0, longest - value.shape[1]] for value in values]
    return [torch.nn.functional.pad(value, pad) for value, pad in zip(values, padding, strict=True)]
