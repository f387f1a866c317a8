"""A dialogue as the model reads it: ids, bidirectional blocks, media in place; and what of it a cache still holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autoglm_lab.engine.media_runs import MediaKind, MediaRun, media_runs
from autoglm_lab.engine.messages import Message
from autoglm_lab.engine.typed_blocks import typed_blocks
from autoglm_lab.errors import MessageError

__all__ = ["MediaKind", "MediaRun", "Prompt", "render", "reusable"]

# What belongs to the sequence itself; every other tensor of a processor belongs to the media.
_SEQUENCE_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "block_sequence_ids")
_OF_SOUNDS = re.compile("audio|speech|input_features|input_values|feature_attention")


@dataclass(frozen=True)
class Prompt:
    """A rendered dialogue.

    Attributes:
        ids: token ids, ``[seq]``.
        blocks: bidirectional block of each token, -1 causal, ``[seq]``; None where the model has none.
        runs: media in the order of the prompt.
        inputs: the processor's tensors for the media, by the model's argument name.
        live: features ``[tokens, hidden]`` of sounds that were encoded while they came in, by digest.
        types: the type of each token, ``[seq]``, by the model's argument name, where the blocks follow from it.
        together: whether what a medium becomes depends on the others, so that one forward must read all of them.
    """

    ids: tuple[int, ...]
    blocks: tuple[int, ...] | None
    runs: tuple[MediaRun, ...]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    live: dict[str, torch.Tensor] = field(default_factory=dict)
    types: dict[str, tuple[int, ...]] = field(default_factory=dict)
    together: bool = False

    def tokens_of(self, kind: MediaKind) -> int:
        return sum(run.length for run in self.runs if run.kind == kind)

    def inputs_of(self, run: MediaRun) -> dict[str, torch.Tensor]:
        """The media tensors of one image or sound, a batch of one; empty where they cannot be told apart."""
        fellows = [one for one in self.runs if one.kind == run.kind]
        given = self._inputs_of_kind(run.kind)
        if len(fellows) == 1:
            return given
        index = fellows.index(run)
        chosen: dict[str, torch.Tensor] = {}
        for name, value in given.items():
            if value.shape[0] == len(fellows):
                chosen[name] = value[index : index + 1]
                continue
            sizes = self.inputs["image_grid_thw"].prod(-1).tolist() if "image_grid_thw" in self.inputs else []
            if name != "pixel_values" or len(sizes) != len(fellows) or sum(sizes) != value.shape[0]:
                return {}
            first = sum(sizes[:index])  # patches of all images in one row
            chosen[name] = value[first : first + sizes[index]]
        return chosen

    def inputs_within(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """The media tensors of the tokens ``[start, end)``, which cut none of `whole`."""
        runs = [run for run in self.runs if start <= run.start < end]
        if len(runs) == len(self.runs):
            return dict(self.inputs)
        parts: dict[str, list[torch.Tensor]] = {}
        for run in runs:
            for name, value in self.inputs_of(run).items():
                parts.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in parts.items()}

    def sliceable(self) -> bool:
        """Whether the media can be read apart from one another, so that a reused prefix can leave some out."""
        return not self.together and all(self.inputs_of(run) for run in self.runs)

    def whole(self) -> list[tuple[int, int]]:
        """The spans ``(first, last + 1)`` that one forward must read, where the model itself encodes the media."""
        if self.runs and not self.sliceable():
            return [(self.runs[0].start, max(run.end for run in self.runs))]
        return [(run.start, run.end) for run in self.runs]

    def _inputs_of_kind(self, kind: MediaKind) -> dict[str, torch.Tensor]:
        if len({run.kind for run in self.runs}) == 1:
            return dict(self.inputs)
        sounds = kind == "audio"
        return {name: value for name, value in self.inputs.items() if bool(_OF_SOUNDS.search(name)) == sounds}


def render(
    model: Any,
    processor: Any,
    messages: Sequence[Message],
    *,
    thinking: bool = False,
    live: dict[str, torch.Tensor] | None = None,
) -> Prompt:
    """The prompt of a dialogue, answer to come.

    Args:
        thinking: let the model think before it answers, where its chat template knows ``enable_thinking``.
        live: features of sounds that need no encoding, by digest.

    Raises:
        MessageError: the model's processor cannot render this dialogue.
    """
    try:
        batch = processor.apply_chat_template(
            _for_processor(processor, messages),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise MessageError(f"this model's chat template cannot render the dialogue: {error}") from error
    if "cross_attention_mask" in batch:
        raise MessageError(
            "this model looks at images from layers of their own (cross-attention), which is not done here: ask in text"
        )
    ids = tuple(batch["input_ids"][0].tolist())
    given = batch.get("block_sequence_ids")
    blocks, types = typed_blocks(model, batch) if given is None else (tuple(given[0].tolist()), {})
    runs = media_runs(model.config, processor, ids, messages)
    apart = all(hasattr(model, f"get_{kind}_features") for kind in ("image", "audio"))
    return Prompt(
        ids=ids,
        blocks=blocks,
        runs=runs,
        inputs={name: value for name, value in batch.items() if name not in _SEQUENCE_INPUTS},
        live=live or {},
        types=types,
        together=len({run.kind for run in runs}) > 1 and not apart,
    )


def reusable(prompt: Prompt, ids: Sequence[int], blocks: Sequence[int] | None, runs: Sequence[MediaRun]) -> int:
    """How many leading tokens of ``prompt`` a cache of ``ids`` holds with the same keys and values.

    The match ends before the first token, medium or block that differs; never inside a medium; and at the start of a
    bidirectional block that is not wholly the same, since its tokens saw all of it. One token is always left to read.
    """
    length = _common(prompt.ids, ids, len(prompt.ids) - 1)
    for new, old in zip(prompt.runs, runs, strict=False):
        if new.start >= length:
            break
        if new != old or new.start + new.length > length:
            length = new.start
            break
    if len(prompt.runs) > len(runs) and prompt.runs[len(runs)].start < length:
        length = prompt.runs[len(runs)].start
    if prompt.blocks is not None:
        old_blocks = blocks if blocks is not None else ()
        length = _common(prompt.blocks, old_blocks, length)
        if 0 < length < len(prompt.blocks):
            length = _block_start(prompt.blocks, old_blocks, length)
    before = [run for run in prompt.runs if run.start < length]
    if 0 < len(before) < len(prompt.runs) and not prompt.sliceable():
        return reusable(prompt, ids[: before[0].start], blocks, ())
    return length


def _block_start(blocks: Sequence[int], old: Sequence[int], length: int) -> int:
    """Move ``length`` back to the start of the block that it would cut, in the new prompt or in the cached one."""
    block = blocks[length - 1]
    cut_here = block != -1 and blocks[length] == block
    cut_there = block != -1 and length < len(old) and old[length] == block
    if cut_here or cut_there:
        while length and blocks[length - 1] == block:
            length -= 1
    return length


def _common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    most = max(0, min(most, len(one), len(other)))
    return next((index for index in range(most) if one[index] != other[index]), most)


def _for_processor(processor: Any, messages: Sequence[Message]) -> list[dict[str, Any]]:
    if hasattr(processor, "tokenizer"):
        return [message.for_processor() for message in messages]
    if any(not hasattr(part, "text") for message in messages for part in message.parts):
        raise MessageError("this model takes text only: it came without an image or audio processor")
    return [{"role": message.role, "content": message.text} for message in messages]
