"""The kernel that decodes NF4. Importing this file needs Triton."""
# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def decode_kernel(codes, scales, table, result, count, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """One program ``BLOCK`` bytes of codes; each scale belongs to ``HALF`` of them, one group."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + at // HALF, mask=inside, other=0).to(tl.float32)
    to = result + at // HALF * (2 * HALF) + at % HALF
    tl.store(to, (tl.load(table + (code & 15)) * scale).to(result.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (tl.load(table + (code >> 4)) * scale).to(result.dtype.element_ty), mask=inside)
