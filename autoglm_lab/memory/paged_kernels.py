"""One decode step's attention over pages on a GPU: two Triton kernels that need no copy of the keys and values.

Everything that changes from step to step (block tables, lengths) is read from the device's memory, so that a captured
graph of them fits every step with the same number of rows.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoglm_lab.memory.page_format import PAGE_TOKENS

if TYPE_CHECKING:
    from autoglm_lab.memory.kv_pool import KvPool

_BLOCK = 64
"""Tokens that one round of a kernel's loop reads."""
_PROGRAMS = 256
"""Parts into which one step's work is cut at least: about two for each multiprocessor of a large card."""
_MOST_SPLITS = 64


def available(pool: KvPool) -> bool:
    """Whether the kernels run here, on pages of this format. Without them keys and values are gathered."""
    form = pool.form
    power_of_two = form.head_dim & (form.head_dim - 1) == 0
    return _triton() and pool.store.codes.is_cuda | _interpreted() and power_of_two and 16 <= form.head_dim <= 256


def write(pool: KvPool, layer: int, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> None:
    """Put one new token's keys and values ``[batch, kv_heads, 1, head_dim]`` at the end of each row.

    Args:
        table: pages of each row, ``int32 [batch, pages]``.
        lengths: tokens of each row with the new one, ``int32 [batch]``.
    """
    kernels, store, form = _kernels(), pool.store, pool.form
    codes, scales = _layer_of(store.codes, layer), _layer_of(store.scales, layer)
    batch, heads = keys.shape[0], form.kv_heads
    kernels.write_kernel[(batch, heads, 2)](
        keys, values, codes, codes if scales is None else scales, table, lengths,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        codes.stride(0), codes.stride(1), codes.stride(2), codes.stride(3),
        0 if scales is None else scales.stride(0), 0 if scales is None else scales.stride(1),
        0 if scales is None else scales.stride(2), 0 if scales is None else scales.stride(3),
        table.stride(0),
        PAGE=PAGE_TOKENS, DIM=form.head_dim, GROUP=form.group, BITS=_bits(pool),
        num_warps=1,
    )  # fmt: skip


def attend(pool: KvPool, layer: int, query: Tensor, scale: float, table: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one new token a row, ``[batch, heads, 1, head_dim]``, over its pages.

    Returns:
        ``[batch, 1, heads, head_dim]`` in the query's dtype.
    """
    kernels, store, form = _kernels(), pool.store, pool.form
    codes, scales = _layer_of(store.codes, layer), _layer_of(store.scales, layer)
    batch, heads, _, dim = query.shape
    group = heads // form.kv_heads
    splits = min(_MOST_SPLITS, 1 << max(1, _PROGRAMS // (batch * form.kv_heads)).bit_length() - 1)
    partial = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=query.device)
    kernels.attend_kernel[(batch, form.kv_heads, splits)](
        query, codes, codes if scales is None else scales, table, lengths, partial, sums, scale * 1.4426950408889634,
        query.stride(0), query.stride(1),
        codes.stride(0), codes.stride(1), codes.stride(2), codes.stride(3),
        0 if scales is None else scales.stride(0), 0 if scales is None else scales.stride(1),
        0 if scales is None else scales.stride(2), 0 if scales is None else scales.stride(3),
        table.stride(0), heads,
        PAGE=PAGE_TOKENS, DIM=dim, SCALE_GROUP=form.group, BITS=_bits(pool), HEADS=group,
        ROWS=max(16, 1 << (group - 1).bit_length()), BLOCK=_BLOCK, SPLITS=splits,
        EXACT=query.dtype == torch.float32,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    result = torch.empty(batch, 1, heads, dim, dtype=query.dtype, device=query.device)
    kernels.join_kernel[(batch, heads)](partial, sums, result, heads, DIM=dim, SPLITS=splits, num_warps=1)
    return result


def _bits(pool: KvPool) -> int:
    return {"model": 16, "int8": 8, "int4": 4}[pool.form.precision]


def _layer_of(tensor: Any, layer: int) -> Any:
    """``[pages, 2, PAGE_TOKENS, kv_heads, width]`` of one layer."""
    return None if tensor is None else tensor[:, layer]


@functools.cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> Any:
    from autoglm_lab.memory import paged_triton

    return paged_triton
