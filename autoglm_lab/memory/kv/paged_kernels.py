"""Keys and values in pages on a GPU, by Triton kernels: written, read, and attended to without a copy of them.

Everything that changes from one decode step to the next (block tables, lengths) is read from the device's memory, so
that a captured graph of them fits every step with the same number of rows.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat, PageStore

_BLOCK = 64
"""Tokens that one round of a kernel's loop reads."""
_PROGRAMS = 256
"""Parts into which one step's work is cut at least: about two for each multiprocessor of a large card."""
_MOST_SPLITS = 64
_LOG2_E = 1.4426950408889634
_verdicts: dict[tuple[PageFormat, torch.device], str] = {}
"""By format and device: why the kernels cannot be compiled, or an empty text."""
_compiling = threading.Lock()


class Pages(Protocol):
    """Pages and their format, as a pool has them."""

    @property
    def form(self) -> PageFormat: ...
    @property
    def store(self) -> PageStore: ...


@dataclass(frozen=True)
class _Pages:
    form: PageFormat
    store: PageStore


def pages_of(pool: Pages) -> Pages:
    """The pages and their format alone."""
    return _Pages(pool.form, pool.store)


def possible(pool: Pages) -> bool:
    """Whether there are kernels for pages of this format on their device, as far as it shows without compiling them."""
    return fits(pool.form) and _triton() and (pool.store.codes.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def available(pool: Pages, heads: int | None = None) -> bool:
    """Whether the kernels run here, on pages of this format. Without them keys and values are gathered.

    The first call for a format compiles them, and remembers where that cannot be done: no C compiler, say.

    Args:
        heads: of the queries to come, so that what is compiled is what they need.
    """
    if not possible(pool):
        return False
    key = pool.form, pool.store.codes.device
    with _compiling:
        if key not in _verdicts:
            try:
                with torch.cuda.device_of(pool.store.codes):
                    _compile(pool, heads or pool.form.kv_heads)
            except Exception as error:  # noqa: BLE001 - whatever Triton lacks here, the plain way works
                _verdicts[key] = f"{type(error).__name__}: {error}".split("\n")[0]
            else:
                _verdicts[key] = ""
        return not _verdicts[key]


def why_not(pool: Pages) -> str:
    """Why the kernels could not be compiled; empty where they could, or were not asked for."""
    return _verdicts.get((pool.form, pool.store.codes.device), "")


def fits(form: PageFormat) -> bool:
    """Whether the kernels can be had for pages of this format."""
    return form.head_dim & (form.head_dim - 1) == 0 and 16 <= form.head_dim <= 256


def write(pool: Pages, layer: int, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> None:
    """Put new keys and values ``[batch, kv_heads, new, head_dim]`` at the end of each row.

    Args:
        table: pages of each row, ``int32 [batch, pages]``.
        lengths: tokens of each row with the new ones, ``int32 [batch]``.
    """
    form = pool.form
    codes, scales, strides = _layer_of(pool, layer)
    batch, heads, new, _ = keys.shape
    keys, values = (one if one.stride(-1) == 1 else one.contiguous() for one in (keys, values))
    _kernels().write_kernel[(batch * new, heads, 2)](
        keys, values, codes, scales, table, lengths, new,
        *keys.stride()[:3], *values.stride()[:3], *strides, table.stride(0),
        PAGE=PAGE_TOKENS, DIM=form.head_dim, GROUP=form.group, BITS=_bits(pool), num_warps=1,
    )  # fmt: skip


def read(pool: Pages, layer: int, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first ``length`` tokens of each row: ``[batch, kv_heads, length, head_dim]`` each."""
    form, batch = pool.form, table.shape[0]
    codes, scales, strides = _layer_of(pool, layer)
    result = torch.empty(2, batch, form.kv_heads, length, form.head_dim, dtype=form.dtype, device=table.device)
    _kernels().read_kernel[(-(-length // _BLOCK), batch * form.kv_heads, 2)](
        codes, scales, table, result, length, *strides, table.stride(0), *result.stride()[:3],
        PAGE=PAGE_TOKENS, DIM=form.head_dim, SCALE_GROUP=form.group, BITS=_bits(pool), BLOCK=_BLOCK,
        HEADS=form.kv_heads, num_warps=4,
    )  # fmt: skip
    return result[0], result[1]


def copy(pool: Pages, layer: int, to: Pages, table: Tensor, lengths: Tensor, width: int) -> None:
    """Bring one layer's pages of each row, row after row, ``width`` places each, as the only layer of other pages."""
    given, taken = pool.store.layer_bytes(layer), to.store.layer_bytes(0)
    words = pool.form.layer_nbytes // 4
    _kernels().copy_kernel[(width, table.shape[0])](
        given, taken, table, lengths, given.stride(0), taken.stride(0), table.stride(0), width, words,
        PAGE=PAGE_TOKENS, BLOCK=4096, num_warps=8,
    )  # fmt: skip


def attend(pool: Pages, layer: int, query: Tensor, scale: float, table: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one new token a row, ``[batch, heads, 1, head_dim]``, over its pages.

    Returns:
        ``[batch, 1, heads, head_dim]`` in the query's dtype.
    """
    kernels, form = _kernels(), pool.form
    codes, scales, strides = _layer_of(pool, layer)
    batch, heads, _, dim = query.shape
    group = heads // form.kv_heads
    splits = splits_of(batch, form.kv_heads)
    partial = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=query.device)
    kernels.attend_kernel[(batch, form.kv_heads, splits)](
        query, codes, scales, table, lengths, partial, sums, scale * _LOG2_E, *query.stride()[:2], *strides,
        table.stride(0), heads,
        PAGE=PAGE_TOKENS, DIM=dim, SCALE_GROUP=form.group, BITS=_bits(pool), HEADS=group,
        ROWS=max(16, 1 << (group - 1).bit_length()), BLOCK=_BLOCK, EXACT=query.dtype == torch.float32,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    result = torch.empty(batch, 1, heads, dim, dtype=query.dtype, device=query.device)
    kernels.join_kernel[(batch, heads)](partial, sums, result, heads, splits, DIM=dim, MOST=_MOST_SPLITS, num_warps=1)
    return result


def splits_of(batch: int, kv_heads: int) -> int:
    """Parts into which the tokens of each row are cut in `attend`."""
    return min(_MOST_SPLITS, 1 << max(1, _PROGRAMS // (batch * kv_heads)).bit_length() - 1)


def _compile(pool: Pages, heads: int) -> None:
    """Run every kernel once, on pages of its own that are like the pool's, so that the first step finds them."""
    form, stride, device = pool.form, pool.store.stride, pool.store.codes.device
    pages = _Pages(form, PageStore(form, torch.zeros(2 * stride, dtype=torch.uint8, device=device), stride))
    new = torch.zeros(1, form.kv_heads, 1, form.head_dim, dtype=form.dtype, device=device)
    query = torch.zeros(1, heads, 1, form.head_dim, dtype=form.dtype, device=device)
    table, lengths = (torch.ones(shape, dtype=torch.int32, device=device) for shape in ((1, 1), (1,)))
    write(pages, 0, new, new, table, lengths)
    read(pages, 0, table, 1)
    attend(pages, 0, query, 1.0, table, lengths)


def _bits(pool: Pages) -> int:
    return {"model": 16, "int8": 8, "int4": 4}[pool.form.precision]


def _layer_of(pool: Pages, layer: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Codes and scales of one layer, and the strides of their pages, parts, slots and heads."""
    codes = pool.store.codes[:, layer]
    if pool.store.scales is None:
        return codes, codes, (*codes.stride()[:4], 0, 0, 0, 0)
    scales = pool.store.scales[:, layer]
    return codes, scales, (*codes.stride()[:4], *scales.stride()[:4])


@functools.cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels() -> Any:
    from autoglm_lab.memory.kv import paged_triton

    return paged_triton
