"""Whether a model with recurrent layers reads a prompt in pieces as it does in one.

Attention layers do. A recurrent layer has to begin with the state that the piece before left, and not every family's
code does so. Nothing but trying tells: some tokens are read both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_TOKENS, _CUT = 24, 11


def reads_in_pieces(model: Any, forward: Callable[..., Tensor], *, told: bool) -> bool:
    """Try it, unless no layer is recurrent.

    Args:
        forward: takes a cache and a forward's arguments; gives logits ``[1, vocab]``.
        told: whether the model takes positions.
    """
    layers = DynamicCache(config=model.config).layers
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return True
    ids = torch.arange(_TOKENS, device=model.device)[None] * 7 % min(97, model.config.get_text_config().vocab_size)

    def read(cuts: list[tuple[int, int]]) -> Tensor:
        cache = DynamicCache(config=model.config)
        logits = torch.empty(0)
        for first, last in cuts:
            given: dict[str, Any] = {"attention_mask": torch.ones(1, last, dtype=torch.long, device=model.device)}
            if told:
                given["position_ids"] = torch.arange(first, last, device=model.device)[None]
            logits = forward(cache, input_ids=ids[:, first:last], **given)
        return logits

    whole = read([(0, _TOKENS)])
    try:
        parts = read([(0, _CUT), (_CUT, _TOKENS)])
    except (RuntimeError, ValueError, IndexError, NotImplementedError):
        return False
    rounding = 1e-3 if whole.dtype == model.dtype else 5e-2
    return bool((whole - parts).abs().max() <= rounding * whole.abs().max())
