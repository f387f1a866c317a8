"""Slabs: one contiguous region of memory for the weights of one module, outside every general allocator.

Released memory is gone for the system at once, which a general allocator does not promise. On CPU a slab is an
anonymous mapping; on CUDA it is mapped by the driver at an address that stays the same across release and commit.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from autoglm_lab.errors import ModuleError
from autoglm_lab.memory.residency.pinned import PinnedBudget, touch
from autoglm_lab.units import format_bytes

ALIGNMENT = 256


@dataclass(frozen=True)
class View:
    """Where one tensor lies in a slab.

    Attributes:
        offset: of its first byte, a multiple of `ALIGNMENT`.
        stride: in elements, as the model had it.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, region: Tensor) -> Tensor:
        """The tensor in ``region`` (``uint8``, ``[nbytes]``)."""
        whole = region[self.offset : self.offset + self.nbytes].view(self.dtype)
        return whole.as_strided(self.shape, self.stride)

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def lay_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, View], int]:
    """Views for ``tensors``, one after the other, and the bytes that they take together.

    Dense tensors keep their strides; others (expanded ones, slices) become contiguous.
    """
    views: dict[str, View] = {}
    end = 0
    for name, tensor in tensors.items():
        stride = (
            tuple(tensor.stride()) if _is_dense(tensor) else tuple(torch.empty(tensor.shape, device="meta").stride())
        )
        view = View(end, tuple(tensor.shape), stride, tensor.dtype)
        views[name] = view
        end += -(-view.nbytes // ALIGNMENT) * ALIGNMENT
    return views, end


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their span exactly once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


class Slab(Protocol):
    """A region that can be committed and released any number of times."""

    @property
    def committed(self) -> int:
        """Bytes that it holds now, rounding to whole pages included; 0 while released."""
        ...

    @property
    def size(self) -> int:
        """Bytes that it holds when committed."""
        ...

    def commit(self) -> Tensor:
        """Take the memory; the whole region as ``uint8`` ``[size]``."""
        ...

    def region(self) -> Tensor:
        """The region while committed. Every call gives a tensor on the same memory."""
        ...

    def alias(self) -> Tensor:
        """As `region`, but `seal` does not count it as a use: for copies that end before the memory goes."""
        ...

    def seal(self) -> None:
        """Make sure that no tensor views the memory any more. Raises `SlabInUseError` while one does."""
        ...

    def drop(self) -> None:
        """Give sealed memory back. Kernels that may still use it must have ended."""
        ...

    def release(self) -> None:
        """Seal, wait for the device, drop. Raises `SlabInUseError`: it stays committed then."""
        ...

    def close(self) -> None:
        """Release, and give up the address."""
        ...


class SlabInUseError(ModuleError):
    """A tensor outside the model still views the memory that was to be released."""


class HostSlab:
    """A slab of the host's memory, exactly whole pages; optionally pinned for copies to a GPU.

    Args:
        pin: lock the pages when `pin` is called.
        budget: what counts pinned bytes and limits them; None: no limit.

    Attributes:
        pinned: whether CUDA copies from it without staging.
        note: why it is not pinned although that was asked for.
    """

    def __init__(self, nbytes: int, *, pin: bool = False, budget: PinnedBudget | None = None) -> None:
        self.size = max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        self.pinned, self.note = False, ""
        self._pin, self._budget = pin, budget
        self._map: mmap.mmap | None = None
        self._keep: Tensor | None = None

    @property
    def committed(self) -> int:
        return 0 if self._map is None else self.size

    def commit(self) -> Tensor:
        if self._map is not None:
            raise ModuleError("this memory is already taken")
        self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and self.size >= 1 << 22:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)  # half the time of the first touch
        return self.region()

    def region(self) -> Tensor:
        if self._keep is None:
            array = self._array()
            self._exported = weakref.ref(array)
            self._keep = torch.frombuffer(array, dtype=torch.uint8)
        return self._keep

    def alias(self) -> Tensor:
        return torch.frombuffer(self._array(), dtype=torch.uint8)

    def _array(self) -> ctypes.Array[ctypes.c_char]:
        # torch.frombuffer does not hold a mapping open; a ctypes array does, so that a mapping which a tensor still
        # views refuses to close.
        if self._map is None:
            raise ModuleError("this memory was given back")
        return (ctypes.c_char * self.size).from_buffer(self._map)

    def touch(self) -> None:
        """Let the system back the memory now. Call it before anything is written."""
        touch(self.alias().data_ptr(), self.size)

    def pin(self) -> None:
        """Lock the pages for CUDA. Call it once they are touched: locking untouched pages is slower."""
        if not self._pin or self.pinned or self._map is None:
            return
        if self._budget is not None and not self._budget.take(self.size):
            used, limit = format_bytes(self._budget.used), format_bytes(self._budget.limit)
            self.note = f"the host copy is not pinned ({used} of the {limit} allowed are): copies are slower"
            return
        code = int(torch.cuda.cudart().cudaHostRegister(self.alias().data_ptr(), self.size, 0))
        self.pinned = code == 0
        if self.pinned:
            self.note = ""
            return
        self.note = f"the host copy is not pinned (cudaHostRegister answered {code}): copies are slower"
        if self._budget is not None:
            self._budget.give(self.size)

    def seal(self) -> None:
        if self._keep is None:
            return
        self._keep = None
        if self._exported() is not None:
            gc.collect()  # a cycle may hold the last view
        array = self._exported()
        if array is not None:
            self._keep = torch.frombuffer(array, dtype=torch.uint8)
            raise SlabInUseError("a tensor outside the model still views these weights")

    def drop(self) -> None:
        if self._map is None:
            return
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.alias().data_ptr())
            self.pinned = False
            if self._budget is not None:
                self._budget.give(self.size)
        try:
            self._map.close()
        except BufferError:
            gc.collect()  # a cycle may hold the last alias
            self._map.close()
        self._map = None

    def release(self) -> None:
        self.seal()
        self.drop()

    def close(self) -> None:
        self.release()


def views_of(region: Tensor, views: Mapping[str, View], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of ``names`` (all by default) in ``region``."""
    return {name: views[name].of(region) for name in (views if names is None else names)}
