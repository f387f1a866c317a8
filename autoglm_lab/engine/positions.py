"""Where the tokens of a dialogue stand, as rotary embeddings count. Given to the model with every step.

Some families (Glm4v, Qwen-VL) give an image's tokens rows and columns, and keep the resulting offset of one
conversation on a module; passing the positions leaves it unused, so that conversations do not disturb each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoglm_lab.engine.prompt import Prompt


@dataclass(frozen=True)
class Places:
    """The positions of a prompt.

    Attributes:
        ids: ``[1, seq]``, or ``[3, 1, seq]`` for time, rows and columns.
        delta: what is added to the count of tokens for what comes after the prompt.
    """

    ids: Tensor
    delta: int = 0


class Positions:
    """The positions that one model expects."""

    def __init__(self, model: Any) -> None:
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        self.stated = "position_ids" in parameters or takes_any
        self.kept = [module for module in model.modules() if hasattr(module, "rope_deltas")]
        counting = [module for module in self.kept if hasattr(module, "get_rope_index")]
        self._index = counting[0].get_rope_index if counting else None
        self._first = _first(model) if "position_ids" in parameters and not self.kept else 0

    @property
    def planes(self) -> int:
        """1, or 3 where images have rows and columns."""
        return 3 if self.kept else 1

    def of(self, prompt: Prompt) -> Places | None:
        """The positions of a prompt; None where only the model itself can tell, in one forward over all of it."""
        length = len(prompt.ids)
        if not self.kept:
            return Places(torch.arange(self._first, self._first + length)[None], self._first)
        if not prompt.runs:
            return Places(torch.arange(length).expand(3, 1, -1))
        return self._counted(prompt)

    def _counted(self, prompt: Prompt) -> Places | None:
        """As the model's own function counts, where it needs no more than a prompt tells."""
        if self._index is None:
            return None
        kinds = {"image": 1, "audio": 3}
        types = torch.zeros(1, len(prompt.ids), dtype=torch.int32)
        for run in prompt.runs:
            types[0, run.start : run.end] = kinds[run.kind]
        known: dict[str, Any] = {
            "input_ids": torch.tensor([prompt.ids]),
            "mm_token_type_ids": types,
            "attention_mask": torch.ones(1, len(prompt.ids), dtype=torch.long),
        }
        parameters = inspect.signature(self._index).parameters
        by_types = "mm_token_type_ids" in parameters
        for kind, name, value in (
            ("image", "image_grid_thw", prompt.inputs.get("image_grid_thw")),
            ("audio", "audio_seqlens", _frames(prompt)),
        ):
            if not any(run.kind == kind for run in prompt.runs):
                continue
            if value is None or name not in parameters or (kind == "audio" and by_types):
                return None
            known[name] = value
        ids, deltas = self._index(**{name: value for name, value in known.items() if name in parameters})
        return Places(ids, int(deltas))

    def after(self, lengths: Sequence[int], deltas: Sequence[int]) -> Tensor:
        """Positions of one new token a row, after so many tokens: ``[batch, 1]`` or ``[3, batch, 1]``."""
        rows = torch.tensor(lengths)[:, None] + torch.tensor(deltas)[:, None]
        return rows.expand(3, -1, -1) if self.kept else rows


def _frames(prompt: Prompt) -> Tensor | None:
    """Frames of each sound, ``[sounds]``."""
    mask = prompt.inputs.get("feature_attention_mask")
    return None if mask is None else mask.sum(-1)


def _first(model: Any) -> int:
    """The first token's position: 0, but 1 in a family or two, which say so only where they prepare a generation."""
    row = torch.zeros(1, 2, dtype=torch.long)
    try:
        prepared = model.prepare_inputs_for_generation(
            row,
            attention_mask=torch.ones_like(row),
            position_ids=torch.arange(2)[None],
            past_key_values=None,
            is_first_iteration=True,
        )
        return int(prepared["position_ids"].flatten()[0])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return 0  # it prepares in another way, and counts as everyone does
