"""The bytes of weights: from where they are into a slab, and from a slab to a file."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from autoglm_lab.errors import ModuleError
from autoglm_lab.memory.residency.cut_weights import fill_cut
from autoglm_lab.memory.residency.packed_weights import fill_packed, refuse_overflow
from autoglm_lab.memory.residency.reader import Piece, Progress, pieces_of, read
from autoglm_lab.memory.residency.staging import Staging
from autoglm_lab.models.checkpoint import DTYPES, FileTensor
from autoglm_lab.models.tensor_sources import CutTensor, DummyTensor, HeldTensor, PackedTensor, Source
from autoglm_lab.units import format_bytes

_CHUNK = 1 << 24
_POOL = 4_194_301  # a prime number of values, so that repeats never line up with rows
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def fill_all(
    targets: Mapping[str, Tensor], sources: Mapping[str, Source], staging: Staging, progress: Progress
) -> None:
    """Give every target (a view of a slab) the values of its source, files first and in several threads.

    Args:
        targets: any device and dtype; values are cast where a source's dtype differs.
        sources: where the values come from, by the same names.
        staging: of the targets' device.
        progress: called with the bytes of targets that are filled so far in addition.

    Raises:
        LoadError: a file is gone, or shorter than its header said. Nothing writes to a target any more.
    """
    with staging:
        whole = {name for name, one in targets.items() if isinstance(sources[name], FileTensor) and one.is_contiguous()}
        read(_pieces({name: targets[name] for name in sorted(whole)}, sources, staging.chunk), staging, progress)

        def rows_of(rows: Tensor, source: Source) -> None:
            fill_all({"": rows}, {"": source}, staging, _untold)

        for name, target in targets.items():
            source = sources[name]
            if isinstance(source, PackedTensor):
                fill_packed(target, source, rows_of, progress)
            elif isinstance(source, CutTensor):
                fill_cut(target, source, rows_of, progress)
            elif name not in whole:
                fill(target, source, progress)
        refuse_overflow(targets, sources)


def _untold(_: int) -> None:
    """Rows that are still to be quantised are no progress."""


def fill(target: Tensor, source: Source, progress: Progress) -> None:
    """Give one target the values of ``source``. See `fill_all`, which is faster for many."""
    if isinstance(source, HeldTensor):
        target.copy_(source.tensor)
        progress(target.numel() * target.element_size())
    elif isinstance(source, DummyTensor):
        _made_up(target, source, progress)
    elif isinstance(source, PackedTensor | CutTensor) or target.is_contiguous():
        fill_all({"": target}, {"": source}, Staging(target.device), progress)
    else:  # turned: the values of the file in the order of the file, then turned
        whole = torch.empty(source.shape, dtype=source.dtype)
        fill(whole, source, lambda _: None)
        target.copy_(whole)
        progress(target.numel() * target.element_size())


def _pieces(targets: Mapping[str, Tensor], sources: Mapping[str, Source], chunk: int) -> Iterator[Piece]:
    """In the order in which they lie in their files, which is how a disk reads fastest."""
    listed = [(source, target) for name, target in targets.items() if isinstance(source := sources[name], FileTensor)]
    for source, target in sorted(listed, key=lambda one: (one[0].path, one[0].offset)):
        yield from pieces_of(source, target, chunk)


_pools: dict[torch.device, Tensor] = {}


def _pool(device: torch.device) -> Tensor:
    if device not in _pools:
        generator = torch.Generator().manual_seed(20_240_229)
        _pools[device] = torch.randn(_POOL, generator=generator).to(device=device, dtype=torch.float16)
    return _pools[device]


def drop_pool() -> None:
    """Forget the normal values that dummy weights are cut from (8 MiB)."""
    _pools.clear()


def _made_up(target: Tensor, source: DummyTensor, progress: Progress) -> None:
    """Dummy values, at the speed of copying: normal ones are windows of one pool, begun where the seed says."""
    nbytes = target.numel() * target.element_size()
    if source.fill != "normal":
        target.fill_(1.0 if source.fill == "ones" else 0.0)
        progress(nbytes)
        return
    pool = _pool(target.device)
    generator = torch.Generator().manual_seed(source.seed)
    flat = target.view(-1) if target.is_contiguous() else torch.empty(target.numel(), dtype=target.dtype)
    done = 0
    while done < flat.numel():
        start = int(torch.randint(_POOL, (), generator=generator))
        count = min(_POOL - start, flat.numel() - done)
        flat[done : done + count].copy_(pool[start : start + count]).mul_(source.std)
        done += count
        progress(count * target.element_size())
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


def write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, FileTensor]:
    """Write ``tensors`` as a safetensors file, chunk by chunk, and say where each lies.

    Raises:
        ModuleError: the disk has no room, or refuses; nothing is left behind.
    """
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if tensor.dtype not in _NAMES:
            raise ModuleError(f"{name} is {tensor.dtype}, which safetensors files cannot hold")
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, start + end)  # a full disk shows before anything is written
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                _write_one(file.fileno(), tensor, file.flush)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ModuleError(
            f"cannot write {format_bytes(end)} of weights to {path.parent}: {error.strerror}. "
            "Make room there, or set TMPDIR to a folder on another disk"
        ) from None
    placed: dict[str, FileTensor] = {}
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        placed[name] = FileTensor(path, start, nbytes, tensor.dtype, tuple(tensor.shape))
        start += nbytes
    return placed


def _write_one(handle: int, tensor: Tensor, flush: Callable[[], None]) -> None:
    flush()
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() == 0:
        return
    flat = flat.view(torch.uint8)
    for begin in range(0, flat.numel(), 4 * _CHUNK):
        chunk = flat[begin : begin + 4 * _CHUNK].cpu()
        memory = memoryview((ctypes.c_char * chunk.numel()).from_address(chunk.data_ptr())).cast("B")
        done = 0
        while done < len(memory):
            done += os.write(handle, memory[done:])
