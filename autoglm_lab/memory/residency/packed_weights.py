"""Weights quantised while they come: some rows at a time, so that the whole is never there in another precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from autoglm_lab.errors import LoadError
from autoglm_lab.models.checkpoint import FileTensor
from autoglm_lab.models.tensor_sources import CutTensor, DummyTensor, HeldTensor, PackedTensor, Source

BUFFER = 64 << 20
"""Bytes of the rows that are there at once as they were."""
_AT_ONCE = 1 << 21
"""Numbers that are quantised at once: what that takes meanwhile is some ten times as many bytes."""
_LARGEST_FLOAT16 = torch.finfo(torch.float16).max

Plain = FileTensor | DummyTensor | HeldTensor | CutTensor


def fill_packed(
    target: Tensor, source: PackedTensor, fill: Callable[[Tensor, Plain], None], progress: Callable[[int], None]
) -> None:
    """Give ``target`` (``uint8 [form.nbytes]``) the codes and scales of a source.

    Args:
        fill: gives a tensor the numbers of a source, in the source's own dtype.
        progress: called with the bytes of ``target`` that are filled so far in addition.

    Raises:
        LoadError: as ``fill`` does; or a weight is no finite number, said with its name.
    """
    form = source.form
    dtype = dtype_of(source.source)
    step = max(1, min(form.rows, BUFFER // (form.columns * dtype.itemsize)))
    buffer = torch.empty(step, form.columns, dtype=dtype, device=target.device)
    few, told = max(1, _AT_ONCE // form.columns), 0
    for first in range(0, form.rows, step):
        count = min(step, form.rows - first)
        fill(buffer[:count], rows_of(source.source, first, count, form.columns))
        problem = ""
        try:
            for at in range(0, count, few):
                form.write(target, first + at, buffer[at : min(at + few, count)])
        except ValueError as error:
            problem = str(error)
        if problem:  # raised outside, so that nothing that views the target hangs on the error
            raise LoadError(f"{source.name} cannot be kept in {form.precision}: {problem}")
        done = form.nbytes * (first + count) // form.rows
        progress(done - told)
        told = done


def rows_of(source: Plain, first: int, count: int, columns: int) -> Plain:
    """Some rows of a source ``[rows, columns]``. Those of a made-up one are made up for themselves."""
    if isinstance(source, FileTensor):
        nbytes = columns * source.dtype.itemsize
        return replace(source, offset=source.offset + first * nbytes, nbytes=count * nbytes, shape=(count, columns))
    if isinstance(source, HeldTensor):
        return HeldTensor(source.tensor[first : first + count])
    if isinstance(source, CutTensor):
        return replace(source, rows=_within(source.rows, first, first + count))
    return replace(source, seed=source.seed + 7919 * first)


def _within(spans: tuple[tuple[int, int], ...], first: int, end: int) -> tuple[tuple[int, int], ...]:
    """The rows ``[first, end)`` of those that lie in ``spans``, as spans of the whole."""
    found, before = [], 0
    for start, stop in spans:
        low, high = start + max(0, first - before), start + min(stop - start, end - before)
        if low < high:
            found.append((low, high))
        before += stop - start
    return tuple(found)


def refuse_overflow(targets: Mapping[str, Tensor], sources: Mapping[str, Source]) -> None:
    """Raise `LoadError` where a weight is too large for the float16 that it was written to.

    Args:
        targets: filled.
        sources: what they were filled with, by the same names.
    """
    for name in _narrowed(targets, sources):
        if bool(targets[name].isinf().any()):
            raise LoadError(
                f"{name} has numbers beyond {_LARGEST_FLOAT16:,.0f}, the largest that float16 holds: "
                "load this module in bfloat16"
            )


def _narrowed(targets: Mapping[str, Tensor], sources: Mapping[str, Source]) -> Iterator[str]:
    for name, target in targets.items():
        source = sources[name]
        source = source.source if isinstance(source, CutTensor) else source
        stored = source.tensor.dtype if isinstance(source, HeldTensor) else getattr(source, "dtype", torch.float16)
        if target.dtype == torch.float16 and stored != torch.float16:
            yield name


def dtype_of(source: Plain) -> torch.dtype:
    """What the rows of a source are read as."""
    if isinstance(source, CutTensor):
        return dtype_of(source.source)
    if isinstance(source, FileTensor):
        return source.dtype
    return source.tensor.dtype if isinstance(source, HeldTensor) else torch.float32
