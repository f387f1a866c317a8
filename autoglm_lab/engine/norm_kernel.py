"""A root-mean-square norm in one kernel, rounded as transformers' own. Importing this file needs Triton."""
# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor, empty_like


@triton.jit
def _kernel(given, weight, result, width, epsilon, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, WIDTH)
    there = dims < width
    numbers = tl.load(given + row * width + dims, mask=there, other=0).to(tl.float32)
    mean = tl.sum(numbers * numbers, 0) / width
    normed = (numbers * tl.rsqrt(mean + epsilon)).to(given.dtype.element_ty)
    scale = tl.load(weight + dims, mask=there, other=0)
    tl.store(result + row * width + dims, normed * scale, mask=there)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight`` times ``hidden`` ``[…, width]`` over the root of its mean square (Zhang and Sennrich 2019)."""
    rows = hidden.contiguous()
    width = rows.shape[-1]
    result = empty_like(rows)
    block = triton.next_power_of_2(width)
    _kernel[(rows.numel() // width,)](
        rows, weight, result, width, epsilon, WIDTH=block, num_warps=min(8, max(1, block // 512))
    )
    return result
