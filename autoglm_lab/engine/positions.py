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

    @property
    def planes(self) -> int:
        """1, or 3 where images have rows and columns."""
        return 3 if self.kept else 1

    def of(self, prompt: Prompt) -> Places | None:
        """The positions of a prompt; None where only the model itself can tell, in one forward over all of it."""
        length = len(prompt.ids)
        if not self.kept:
            return Places(torch.arange(length)[None])
        if not prompt.runs:
            return Places(torch.arange(length).expand(3, 1, -1))
        return self._with_images(prompt)

    def _with_images(self, prompt: Prompt) -> Places | None:
        if self._index is None or any(run.kind != "image" for run in prompt.runs):
            return None
        types = torch.zeros(1, len(prompt.ids), dtype=torch.int32)
        for run in prompt.runs:
            types[0, run.start : run.start + run.length] = 1
        known = {
            "input_ids": torch.tensor([prompt.ids]),
            "mm_token_type_ids": types,
            "image_grid_thw": prompt.inputs.get("image_grid_thw"),
            "attention_mask": torch.ones(1, len(prompt.ids), dtype=torch.long),
        }
        parameters = inspect.signature(self._index).parameters
        if known["image_grid_thw"] is None or "mm_token_type_ids" not in parameters:
            return None
        ids, deltas = self._index(**{name: value for name, value in known.items() if name in parameters})
        return Places(ids, int(deltas))

    def after(self, lengths: Sequence[int], deltas: Sequence[int]) -> Tensor:
        """Positions of one new token a row, after so many tokens: ``[batch, 1]`` or ``[3, batch, 1]``."""
        rows = torch.tensor(lengths)[:, None] + torch.tensor(deltas)[:, None]
        return rows.expand(3, -1, -1) if self.kept else rows
