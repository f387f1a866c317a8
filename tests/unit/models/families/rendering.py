"""A processor for any tiny family: one token a character, media turned to tensors by a function of the family."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 200
MARKERS = 180
"""Ids from here on are markers: nothing that is typed or generated becomes one."""
USER, ASSISTANT, SYSTEM = 180, 181, 182
BEGIN, END, ROW = 183, 184, 185
IMAGE, AUDIO, VIDEO = 190, 191, 192
_FIRST = 3  # padding, end and beginning come before

Media = Callable[[Any], tuple[list[int], dict[str, Tensor]]]
"""From an image or samples to the tokens in its place, and the tensors that belong to it."""


def noise(source: Any, *shape: int) -> Tensor:
    """Numbers that depend on an image or a sound, and on nothing else."""
    data = source.tobytes()
    seed = int.from_bytes(hashlib.sha256(data).digest()[:7], "little")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TinyTokenizer:
    """Characters to ids and back; markers have no text."""

    unk_token_id = None
    eos_token_id = 1
    chat_template = ""

    def encode(self, text: str) -> list[int]:
        return [_FIRST + (ord(one) - 0x100 if ord(one) >= 0x100 else ord(one)) % (MARKERS - _FIRST) for one in text]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(0x100 + one - _FIRST) for one in ids if _FIRST <= one < MARKERS)

    def convert_tokens_to_ids(self, token: str) -> None:
        return None


class TinyProcessor:
    """Renders a dialogue as the processors of real families do.

    Args:
        media: how the family takes an image, a sound.
        sequence: tensors ``[1, seq]`` that the family's processor adds, from the ids.
    """

    chat_template = ""

    def __init__(
        self, media: Mapping[str, Media], sequence: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    ) -> None:
        self.tokenizer, self._media, self._sequence = TinyTokenizer(), media, sequence

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> dict[str, Tensor]:
        ids: list[int] = [2]
        tensors: dict[str, list[Tensor]] = {}
        for message in messages:
            ids.append({"user": USER, "assistant": ASSISTANT, "system": SYSTEM}[message["role"]])
            for part in message["content"]:
                if part["type"] == "text":
                    ids += self.tokenizer.encode(part["text"])
                    continue
                tokens, given = self._media[part["type"]](part[part["type"]])
                ids += tokens
                for name, value in given.items():
                    tensors.setdefault(name, []).append(value)
        ids.append(ASSISTANT)
        row = torch.tensor([ids])
        joined = {name: torch.cat(values) for name, values in tensors.items()}
        return {"input_ids": row, "attention_mask": torch.ones_like(row), **self._sequence(row), **joined}
