"""Products with 2:4 sparse weights through kernels that read only what is kept; see `quantized_products`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from autoglm_lab.models.sparse_format import SparseFormat

_OUTPUTS, _WIDTH = 8, 512
"""For one row: outputs that a program makes, and fours of each that it takes at once."""
_FEW_OUTPUTS, _FEW_WIDTH = 32, 64
"""For some rows: the same."""


def one_row(row: Tensor, packed: Tensor, form: SparseFormat, programs: int) -> Tensor:
    """``row @ weight.T``, ``[1, outputs]``; at least half of ``programs`` programs where the weight has the rows."""
    outputs = _OUTPUTS
    while outputs > 1 and -(-form.rows // outputs) < programs // 2:
        outputs //= 2
    result = row.new_empty(1, form.rows)
    _kernels().sparse_row_kernel[(-(-form.rows // outputs),)](
        row, form.codes(packed), form.values(packed), result, form.rows,
        FOURS=form.fours, OUTPUTS=outputs, WIDTH=min(_WIDTH, _whole(form.fours)), num_warps=4, num_stages=3,
    )  # fmt: skip
    return result


def few_rows(rows: Tensor, packed: Tensor, form: SparseFormat, programs: int) -> Tensor:
    """``rows @ weight.T`` for at most 64 rows: sums of ``[splits, rows, outputs]``, or the result where it is one."""
    count, width = rows.shape[0], max(16, min(_FEW_WIDTH, _whole(form.fours)))
    blocks, steps = -(-form.rows // _FEW_OUTPUTS), -(-form.fours // width)
    splits = min(16, steps, max(1, programs // blocks))
    result = rows.new_empty(splits, count, form.rows, dtype=rows.dtype if splits == 1 else torch.float32)
    _kernels().sparse_rows_kernel[(blocks, splits)](
        rows, form.codes(packed), form.values(packed), result, count, form.rows,
        FOURS=form.fours, OUTPUTS=_FEW_OUTPUTS, WIDTH=width, ROWS=max(16, _whole(count)),
        EXACT=rows.dtype == torch.float32, num_warps=4, num_stages=3,
    )  # fmt: skip
    return result


def decoded(packed: Tensor, form: SparseFormat, first: int, end: int, dtype: torch.dtype) -> Tensor:
    """The weights of some rows, zeros where none is kept: ``[end - first, columns]``."""
    result = torch.empty(end - first, form.columns, dtype=dtype, device=packed.device)
    width = min(1024, _whole(form.columns))
    _kernels().sparse_decode_kernel[(end - first, -(-form.columns // width))](
        form.codes(packed), form.values(packed), result, first, FOURS=form.fours, WIDTH=width, num_warps=4
    )
    return result


def _whole(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _kernels() -> Any:
    from autoglm_lab.models import sparse_triton

    return sparse_triton
