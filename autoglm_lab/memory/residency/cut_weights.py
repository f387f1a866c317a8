"""A part of a tensor, read a block of whole rows at a time: the whole is never there at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from autoglm_lab.memory.residency.packed_weights import BUFFER, Plain, dtype_of, rows_of
from autoglm_lab.models.tensor_sources import CutTensor, DummyTensor


def fill_cut(
    target: Tensor, source: CutTensor, fill: Callable[[Tensor, Plain], None], progress: Callable[[int], None]
) -> None:
    """Give ``target`` what a source names of a tensor.

    Args:
        target: contiguous, of the part's shape.
        fill: gives a tensor some rows of the whole, in the whole's own dtype.
        progress: called with the bytes of ``target`` that are filled so far in addition.

    Raises:
        LoadError: as ``fill`` does.
    """
    dtype = dtype_of(source.source)
    width = torch.Size(source.shape[1:]).numel()
    first_column, end_column = source.columns or (0, width)
    step = max(1, BUFFER // (width * dtype.itemsize))
    part, at = target.view(-1, end_column - first_column), 0
    buffer = torch.empty(min(step, source.shape[0]), width, dtype=dtype, device=target.device)
    for first, end, low, high in _blocks(source, step):
        rows = buffer[: end - first]
        fill(rows, rows_of(source.source, first, end - first, width))
        part[at : at + high - low].copy_(rows[low - first : high - first, first_column:end_column])
        progress((high - low) * part.shape[1] * target.element_size())
        at += high - low


def _blocks(source: CutTensor, step: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows to read ``[first, end)``, and those of them that are wanted ``[low, high)``.

    Made-up rows depend on where their block begins, so every rank makes up the same blocks.
    """
    for start, stop in source.rows:
        for block in range(start - start % step, stop, step):
            low, high = max(start, block), min(stop, block + step)
            whole = isinstance(source.source, DummyTensor)
            yield (block, min(block + step, source.shape[0]), low, high) if whole else (low, high, low, high)
