"""4-bit NormalFloat: sixteen values that fit numbers of a normal distribution, scaled by the largest of each group.

After Dettmers et al., "QLoRA" (2023), section 3: the values are quantiles of the standard normal distribution, seven
of them below zero, eight above, and zero itself, divided by the largest.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from statistics import NormalDist

import torch
from torch import Tensor

_LAST_QUANTILE = 0.9677083
"""Between one half and this are the quantiles of either side."""
_LEAST_SCALE = torch.finfo(torch.float32).tiny
_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84)


@functools.cache
def values() -> tuple[float, ...]:
    """The sixteen values, -1 to 1, ascending."""
    below, above = _quantiles(7), _quantiles(8)
    return (*(-one / below[0] for one in below), 0.0, *(one / above[0] for one in reversed(above)))


def _quantiles(count: int) -> list[float]:
    """Quantiles of one side, the largest first."""
    step = (_LAST_QUANTILE - 0.5) / count
    return [NormalDist().inv_cdf(_LAST_QUANTILE - step * at) for at in range(count)]


@functools.cache
def table(device: torch.device) -> Tensor:
    """`values` on a device: ``float32 [16]``."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values(), dtype=torch.float32, device=device)


def encode(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``[rows, groups, group]``.

    A scale is the largest number of its group, or less where clipping it loses less in all.

    Returns:
        ``uint8 [rows, groups * group / 2]``, of a group the first half of its columns in the low halves of its bytes;
        and ``bfloat16 [rows, groups, 1]``.
    """
    largest = numbers.abs().amax(-1, keepdim=True)
    known = table(numbers.device)
    scale, best = largest, torch.full_like(largest, float("inf"))
    for shrink in _SHRINKS:
        tried = (largest * shrink).bfloat16().float()
        error = known[_codes(numbers, tried, known)].mul_(tried).sub_(numbers).square_().sum(-1, keepdim=True)
        scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)
    codes, scale = _codes(numbers, scale, known).to(torch.uint8), scale.bfloat16()
    width = numbers.shape[-1] // 2
    return (codes[..., :width] | (codes[..., width:] << 4)).flatten(1), scale


def _codes(numbers: Tensor, scale: Tensor, known: Tensor) -> Tensor:
    between = (known[1:] + known[:-1]) / 2
    return torch.bucketize(numbers / scale.clamp_min(_LEAST_SCALE), between, out_int32=True)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers behind ``uint8 [rows, columns / 2]`` and ``bfloat16 [rows, groups, 1]``: ``[rows, columns]``."""
    half = codes.shape[-1] // scales.shape[-2]
    if _has_kernel(codes):
        return _on_gpu(codes.contiguous(), scales.contiguous(), half, dtype)
    known, grouped = table(codes.device), codes.unflatten(-1, (-1, half))
    numbers = torch.cat([known[part.int()] for part in (grouped & 15, grouped >> 4)], dim=-1)
    return numbers.mul_(scales).flatten(-2).to(dtype)


def _on_gpu(codes: Tensor, scales: Tensor, half: int, dtype: torch.dtype) -> Tensor:
    from autoglm_lab.models.nf4_triton import BLOCK, decode_kernel

    result = torch.empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype, device=codes.device)
    decode_kernel[(-(-codes.numel() // BLOCK),)](
        codes, scales, table(codes.device), result, codes.numel(), HALF=half, BLOCK=BLOCK, num_warps=4
    )
    return result


_verdicts: dict[torch.device, bool] = {}


def _has_kernel(codes: Tensor) -> bool:
    """Whether the kernel runs on the device of ``codes``. Found out once; without it torch's own operations decode."""
    if not codes.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if type(codes) is not Tensor or codes.is_meta or importlib.util.find_spec("triton") is None:
        return False
    device = codes.device
    if device not in _verdicts:
        given = torch.arange(32, dtype=torch.uint8, device=device)[None], torch.ones(1, 1, 1, dtype=torch.bfloat16)
        _verdicts[device] = False
        expected = decode(given[0], given[1].to(device), torch.float32)
        try:
            _verdicts[device] = bool((_on_gpu(given[0], given[1].to(device), 32, torch.float32) == expected).all())
        except Exception:  # noqa: BLE001 - whatever Triton lacks here, the plain way works
            return False
    return _verdicts[device]
