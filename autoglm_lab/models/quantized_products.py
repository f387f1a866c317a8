"""Products with quantised or sparse weights: few rows through one kernel that reads the codes, many slice by slice.

Decoding a token reads every weight once, so what counts is the bytes that are read: on CUDA a kernel multiplies the
codes as they come. A prompt has many rows; then a slice of the weight is decoded into a small buffer and multiplied by
the device's own routine, which costs little beside the product itself.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoglm_lab.models import sparse_products
from autoglm_lab.models.sparse_format import SparseFormat
from autoglm_lab.models.weight_format import WeightFormat

Packed = WeightFormat | SparseFormat

FEW_ROWS = 64
"""Most rows that go through the kernels."""
SLICE_BYTES = 32 << 20
"""Most bytes of weights that are decoded at once."""
_MOST_SPLITS = 16
_PROGRAMS = 264
"""Programs that keep a large GPU busy: two for each of its 132 processors."""


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work. None of it changes what comes out, but for the order of sums.

    Attributes:
        outputs: columns of the result that a program makes.
        inputs: weights of a row that it takes at once.
        warps: of a program.
        stages: loads that are under way at the same time.
    """

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 3


ONE_ROW = {"int8": Tiles(8, 1024), "int4": Tiles(8, 2048)}
"""For one row: each program makes few outputs, and reads long pieces of their weights."""
FEW = {"int8": Tiles(32, 128, stages=4), "int4": Tiles(32, 256, stages=4)}
"""For some rows: small matrix products."""


def product(rows: Tensor, packed: Tensor, form: Packed) -> Tensor:
    """``rows @ weight.T``.

    Args:
        rows: ``[some, columns]``.
        packed: ``weight`` ``[outputs, columns]`` as ``form`` keeps it.

    Returns:
        ``[some, outputs]`` in the dtype of ``rows``.
    """
    count = rows.shape[0]
    if 0 < count <= FEW_ROWS and _has_kernels(packed, form):
        rows = rows.contiguous()
        return _one_row(rows, packed, form) if count == 1 else _few_rows(rows, packed, form)
    step = slice_rows(form, rows.dtype)
    if step >= form.rows:
        return functional.linear(rows, _decoded(packed, form, 0, form.rows, rows.dtype))
    result = rows.new_empty(count, form.rows)
    for first in range(0, form.rows, step):
        end = min(first + step, form.rows)
        result[:, first:end] = functional.linear(rows, _decoded(packed, form, first, end, rows.dtype))
    return result


def product_backward(gradient: Tensor, packed: Tensor, form: Packed) -> Tensor:
    """``gradient @ weight``, slice by slice: what reaches the inputs of `product`."""
    result = gradient.new_zeros(gradient.shape[0], form.columns)
    step = slice_rows(form, gradient.dtype)
    for first in range(0, form.rows, step):
        end = min(first + step, form.rows)
        result.addmm_(gradient[:, first:end], _decoded(packed, form, first, end, gradient.dtype))
    return result


def slice_rows(form: Packed, dtype: torch.dtype) -> int:
    """Rows of a weight that are decoded at once."""
    return max(1, SLICE_BYTES // (form.columns * dtype.itemsize))


def why_not() -> str:
    """Why the kernels cannot be used although there is a GPU; empty where they can, or were not tried."""
    return next(filter(None, _verdicts.values()), "")


def prepare(form: Packed, device: torch.device, dtype: torch.dtype) -> None:
    """Compile the kernels for one row, so that the first step finds them."""
    packed = torch.zeros(form.nbytes, dtype=torch.uint8, device=device)
    product(torch.zeros(1, form.columns, dtype=dtype, device=device), packed, form)


def _decoded(packed: Tensor, form: Packed, first: int, end: int, dtype: torch.dtype) -> Tensor:
    if not _has_kernels(packed, form):
        return form.decode(packed, first, end, dtype)
    if isinstance(form, SparseFormat):
        return sparse_products.decoded(packed, form, first, end, dtype)
    result = torch.empty(end - first, form.columns, dtype=dtype, device=packed.device)
    width = min(1024, 1 << (form.code_width - 1).bit_length())
    pieces = -(-form.code_width // width)
    _kernels().decode_kernel[(end - first, pieces)](
        form.codes(packed), form.scales(packed), result, first, form.columns,
        CODE_WIDTH=form.code_width, GROUP=form.group, BITS=_bits(form), WIDTH=width, num_warps=4,
    )  # fmt: skip
    return result


def _one_row(row: Tensor, packed: Tensor, form: Packed) -> Tensor:
    if isinstance(form, SparseFormat):
        return sparse_products.one_row(row, packed, form, _PROGRAMS)
    tiles = ONE_ROW[form.precision]
    outputs = tiles.outputs
    while outputs > 1 and -(-form.rows // outputs) < _PROGRAMS // 2:
        outputs //= 2
    result = row.new_empty(1, form.rows)
    _kernels().one_row_kernel[(-(-form.rows // outputs),)](
        row, form.codes(packed), form.scales(packed), result, form.rows,
        COLUMNS=form.columns, CODE_WIDTH=form.code_width, GROUP=form.group, BITS=_bits(form), OUTPUTS=outputs,
        WIDTH=_width(form, tiles.inputs), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return result


def _few_rows(rows: Tensor, packed: Tensor, form: Packed) -> Tensor:
    if isinstance(form, SparseFormat):
        return _added(sparse_products.few_rows(rows, packed, form, _PROGRAMS), rows.dtype)
    tiles, count = FEW[form.precision], rows.shape[0]
    blocks = -(-form.rows // tiles.outputs)
    width = _width(form, tiles.inputs)
    steps = -(-form.code_width // width)
    splits = min(_MOST_SPLITS, steps, max(1, _PROGRAMS // blocks))
    parts = rows.new_empty(splits, count, form.rows, dtype=rows.dtype if splits == 1 else torch.float32)
    _kernels().few_rows_kernel[(blocks, splits)](
        rows, form.codes(packed), form.scales(packed), parts, count, form.rows,
        COLUMNS=form.columns, CODE_WIDTH=form.code_width, GROUP=form.group, BITS=_bits(form), OUTPUTS=tiles.outputs,
        WIDTH=width, ROWS=max(16, 1 << (count - 1).bit_length()), EXACT=rows.dtype == torch.float32,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return _added(parts, rows.dtype)


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the splits ``[splits, rows, outputs]``, in their order."""
    if parts.shape[0] == 1:
        return parts[0]
    result = parts.new_empty(parts.shape[1:], dtype=dtype)
    _kernels().add_kernel[(-(-result.numel() // 1024),)](parts, result, result.numel(), parts.shape[0], BLOCK=1024)
    return result


def _width(form: WeightFormat, inputs: int) -> int:
    """Bytes of codes of a row that are read at once: a power of two, whole groups in 4 bits."""
    if form.precision == "int8":
        return min(inputs, 1 << (form.columns - 1).bit_length())
    half, most = form.group // 2, 1 << (form.code_width - 1).bit_length()
    return max(half, min(inputs // 2, most))


def _bits(form: WeightFormat) -> int:
    return 8 if form.precision == "int8" else 4


_verdicts: dict[type, str] = {}


def _has_kernels(packed: Tensor, form: Packed) -> bool:
    """Whether the kernels of a format run here. Found out once; else slices are decoded for a single row too."""
    if not packed.is_cuda and (packed.is_meta or os.environ.get("TRITON_INTERPRET") != "1"):
        return False
    if isinstance(form, WeightFormat) and form.precision == "nf4":
        return False  # `nf4.decode` has one of its own, for any number of rows
    if type(packed) is not Tensor or not _triton():  # what is a kind of its own, as tensors without data are, stays so
        return False
    kind = type(form)
    if kind not in _verdicts:
        _verdicts[kind] = ""
        small = SparseFormat(16, 64, torch.float32) if kind is SparseFormat else WeightFormat(16, 64, "int4")
        try:
            prepare(small, packed.device, torch.float32)
        except Exception as error:  # noqa: BLE001 - whatever Triton lacks here, the plain way works
            _verdicts[kind] = f"{type(error).__name__}: {error}".split("\n")[0]
    return not _verdicts[kind]


@functools.cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels() -> Any:
    from autoglm_lab.models import quantized_triton

    return quantized_triton
