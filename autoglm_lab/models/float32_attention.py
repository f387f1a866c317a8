"""Attention in float32 for models that a CPU computes in half precision.

torch's attention for CPUs is slower in bfloat16 than in float32, backward above all, where matrix products are
several times as fast (torch 2.13 on a processor with AVX-512 BF16).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_HALF = (torch.bfloat16, torch.float16)


class Float32Attention(TorchFunctionMode):
    """While it is active, attention on a CPU is computed in float32; what it gives has the dtype that it would have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and args[0].device.type == "cpu":
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
    cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if cast else query.dtype
    if dtype not in _HALF:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, **settings)
    with torch.autocast("cpu", enabled=False):
        mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
        made = functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, **settings)
    return made.to(dtype)
