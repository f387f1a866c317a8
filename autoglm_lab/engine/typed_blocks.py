"""Which tokens of a prompt see one another ahead, in families that tell their model so by a type of each token.

Gemma 3 lets an image's tokens see one another, PaliGemma all of the prompt. What a type means is asked of the model's
own masks, on three tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_NAMES = ("token_type_ids", "mm_token_type_ids")


def typed_blocks(model: Any, batch: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, dict[str, tuple[int, ...]]]:
    """The bidirectional blocks of a prompt, as `Prompt.blocks`, and the types that make them, as `Prompt.types`.

    Args:
        batch: what the processor gave.

    Returns:
        None and nothing where this model's attention does not depend on types.
    """
    masks = getattr(model, "create_masks_for_generate", None)
    accepted = inspect.signature(masks).parameters if masks is not None else {}
    name = next((name for name in _NAMES if name in accepted and name in batch), None)
    if name is None:
        return None, {}
    types = tuple(int(kind) for kind in batch[name][0])
    runs = {kind for kind in set(types) if _sees(model, name, (kind, kind, kind), 1)}
    joined = {kind for kind in runs if _sees(model, name, (kind, kind + 1, kind), 2)}
    if not runs:
        return None, {}
    return _blocks(types, runs, joined), {name: types}


def _sees(model: Any, name: str, types: tuple[int, ...], ahead: int) -> bool:
    """Whether the first of some tokens sees the one that is so far ahead."""
    count = len(types)
    masks = model.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.zeros(1, count, 1),
        attention_mask=torch.ones(1, count, dtype=torch.long),
        past_key_values=None,
        position_ids=torch.arange(count)[None],
        **{name: torch.tensor([types])},
    )
    every = masks.values() if isinstance(masks, Mapping) else [masks]
    return any(_allows(mask, ahead) for mask in every)


def _allows(mask: Any, ahead: int) -> bool:
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return False
    value = mask[0, 0, 0, ahead]
    return bool(value) if mask.dtype == torch.bool else float(value) == 0.0


def _blocks(types: tuple[int, ...], runs: set[int], joined: set[int]) -> tuple[int, ...]:
    """Tokens of a type in ``runs`` are one block a run, those of a type in ``joined`` one block in all."""
    blocks: list[int] = []
    following = len(joined)
    numbers = {kind: number for number, kind in enumerate(sorted(joined))}
    before: int | None = None
    for kind in types:
        if kind not in runs:
            blocks.append(-1)
        elif kind in joined:
            blocks.append(numbers[kind])
        else:
            following += kind != before
            blocks.append(following)
        before = kind
    return tuple(blocks)
