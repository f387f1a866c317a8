"""A dialogue as the model reads it: ids, bidirectional blocks, media in place; and what of it a cache still holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from autoglm_lab.engine.messages import AudioPart, ImagePart, Message, media
from autoglm_lab.errors import MessageError

MediaKind = Literal["image", "audio"]

_PLACEHOLDERS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("image_token_id", "image_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}
# What belongs to the sequence itself; every other tensor of a processor belongs to the media.
_SEQUENCE_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "block_sequence_ids")
_MEDIA_INPUTS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("pixel_values", "image_grid_thw", "image_sizes"),
    "audio": ("input_features", "input_features_mask", "feature_attention_mask"),
}


@dataclass(frozen=True)
class MediaRun:
    """One image or sound in the prompt: its placeholder tokens ``[start, start + length)`` and its content's digest."""

    kind: MediaKind
    start: int
    length: int
    digest: str

    @property
    def span(self) -> tuple[int, int, str]:
        return self.start, self.length, self.digest


@dataclass(frozen=True)
class Prompt:
    """A rendered dialogue.

    Attributes:
        ids: token ids, ``[seq]``.
        blocks: bidirectional block of each token, -1 causal, ``[seq]``; None where the model has none.
        runs: media in the order of the prompt.
        inputs: the processor's tensors for the media, by the model's argument name.
        live: features ``[tokens, hidden]`` of sounds that were encoded while they came in, by digest.
    """

    ids: tuple[int, ...]
    blocks: tuple[int, ...] | None
    runs: tuple[MediaRun, ...]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    live: dict[str, torch.Tensor] = field(default_factory=dict)

    def tokens_of(self, kind: MediaKind) -> int:
        return sum(run.length for run in self.runs if run.kind == kind)

    def runs_from(self, start: int, kind: MediaKind) -> list[MediaRun]:
        return [run for run in self.runs if run.kind == kind and run.start >= start]

    def inputs_from(self, start: int) -> dict[str, torch.Tensor]:
        """The media tensors that the tokens from ``start`` on need: those of media before it are left out."""
        chosen: dict[str, torch.Tensor] = {}
        for kind, names in _MEDIA_INPUTS.items():
            needed = self.runs_from(start, kind)
            given = [name for name in names if needed and name in self.inputs]
            if not start:
                chosen |= {name: self.inputs[name] for name in given}
            elif given:
                parts = [self.inputs_of(run) for run in needed]
                chosen |= {name: torch.cat([part[name] for part in parts]) for name in given}
        known = {name for names in _MEDIA_INPUTS.values() for name in names}
        return chosen | {name: value for name, value in self.inputs.items() if name not in known}

    def inputs_of(self, run: MediaRun) -> dict[str, torch.Tensor]:
        """The media tensors of one image or sound, a batch of one; empty where they cannot be told apart."""
        fellows = [one for one in self.runs if one.kind == run.kind]
        index = fellows.index(run)
        chosen: dict[str, torch.Tensor] = {}
        for name in _MEDIA_INPUTS[run.kind]:
            value = self.inputs.get(name)
            if value is None:
                continue
            if value.shape[0] == len(fellows):
                chosen[name] = value[index : index + 1]
                continue
            sizes = self.inputs["image_grid_thw"].prod(-1).tolist() if "image_grid_thw" in self.inputs else []
            if name != "pixel_values" or len(sizes) != len(fellows) or sum(sizes) != value.shape[0]:
                return {}
            first = sum(sizes[:index])  # patches of all images in one row
            chosen[name] = value[first : first + sizes[index]]
        return chosen

    def sliceable(self) -> bool:
        """Whether each medium's tensors can be told apart, so that a reused prefix can leave its media out."""
        if not all(self.inputs_of(run) for run in self.runs):
            return False
        return all(name in _MEDIA_INPUTS["image"] + _MEDIA_INPUTS["audio"] for name in self.inputs)


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
    ids = tuple(batch["input_ids"][0].tolist())
    blocks = batch.get("block_sequence_ids")
    return Prompt(
        ids=ids,
        blocks=None if blocks is None else tuple(blocks[0].tolist()),
        runs=_runs(model.config, ids, messages),
        inputs={name: value for name, value in batch.items() if name not in _SEQUENCE_INPUTS},
        live=live or {},
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
    if length and prompt.runs and not prompt.sliceable():
        return 0
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


def _runs(config: Any, ids: Sequence[int], messages: Sequence[Message]) -> tuple[MediaRun, ...]:
    runs: list[MediaRun] = []
    parts: dict[MediaKind, type[ImagePart | AudioPart]] = {"image": ImagePart, "audio": AudioPart}
    for kind, part in parts.items():
        digests = [medium.digest for medium in media(messages, part)]
        token = next((getattr(config, name) for name in _PLACEHOLDERS[kind] if hasattr(config, name)), None)
        if not digests:
            continue
        spans = _spans(ids, token)
        if len(spans) != len(digests):
            raise MessageError(
                f"the dialogue has {len(digests)} {kind} part(s), but this model's prompt shows {len(spans)}: "
                f"it may not take {kind} at all; wb.engine.capabilities.modalities lists what it takes"
            )
        for (start, end), digest in zip(spans, digests, strict=True):
            runs.append(MediaRun(kind, start, end - start, digest))
    return tuple(sorted(runs, key=lambda run: run.start))


def _spans(ids: Sequence[int], token: int | None) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for index, value in enumerate(ids):
        if value != token:
            continue
        if spans and spans[-1][1] == index:
            spans[-1] = (spans[-1][0], index + 1)
        else:
            spans.append((index, index + 1))
    return spans


def _for_processor(processor: Any, messages: Sequence[Message]) -> list[dict[str, Any]]:
    if hasattr(processor, "tokenizer"):
        return [message.for_processor() for message in messages]
    if any(not hasattr(part, "text") for message in messages for part in message.parts):
        raise MessageError("this model takes text only: it came without an image or audio processor")
    return [{"role": message.role, "content": message.text} for message in messages]
