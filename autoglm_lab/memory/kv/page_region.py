"""Address space for pages: reserved once for as many as could ever be, backed by memory only where pages are in use."""

from __future__ import annotations

import ctypes
import mmap
from typing import Protocol

import torch
from torch import Tensor

from autoglm_lab.memory.cuda_driver import DriverMemory, Export

_FOR_KERNELS = 1 | 2  # cudaHostRegisterPortable | cudaHostRegisterMapped


class PageRegion(Protocol):
    """A range of addresses in chunks that are backed and given back one by one.

    Attributes:
        chunk: bytes of a chunk.
        bytes: the whole range as ``uint8`` ``[size]``; only backed chunks may be touched.
    """

    chunk: int
    bytes: Tensor

    def back(self, index: int) -> None:
        """Back chunk ``index`` with memory. Raises `MemoryError` where there is none."""
        ...

    def give_back(self, index: int) -> None:
        """Give the memory of chunk ``index`` back; its contents are gone."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class HostPageRegion:
    """The host's: an anonymous mapping, which the kernel backs at the first touch."""

    def __init__(self, nbytes: int, chunk: int) -> None:
        self.chunk = -(-chunk // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = self._reserve(max(1, -(-nbytes // self.chunk)))
        size = len(self._map)
        self.bytes = torch.frombuffer((ctypes.c_char * size).from_buffer(self._map), dtype=torch.uint8)

    def _reserve(self, chunks: int) -> mmap.mmap:
        """Addresses for ``chunks``, or for as many as a system that does not overcommit allows."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        while True:
            try:
                return mmap.mmap(-1, chunks * self.chunk, flags=flags)
            except OSError:
                if chunks == 1:
                    raise
                chunks //= 2

    def back(self, index: int) -> None:
        del index

    def give_back(self, index: int) -> None:
        self._map.madvise(mmap.MADV_DONTNEED, index * self.chunk, self.chunk)

    def close(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)


class PinnedPageRegion:
    """The host's, pinned, as a tensor of the GPU: kernels read and write it over the bus."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.chunk = 32 << 20
        chunks = max(1, -(-nbytes // self.chunk))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(-1, chunks * self.chunk, flags=flags)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._backed: set[int] = set()
        self.back(0)  # torch asks the driver about the first address
        self.bytes = torch.as_tensor(Export(self._address, chunks * self.chunk), device=device)

    def back(self, index: int) -> None:
        if index in self._backed:
            return
        code = int(torch.cuda.cudart().cudaHostRegister(self._address + index * self.chunk, self.chunk, _FOR_KERNELS))
        if code:
            raise MemoryError(f"the host's memory cannot be pinned (cudaHostRegister answered {code})")
        self._backed.add(index)

    def give_back(self, index: int) -> None:
        if index in self._backed:
            self._backed.discard(index)
            torch.cuda.cudart().cudaHostUnregister(self._address + index * self.chunk)
            self._map.madvise(mmap.MADV_DONTNEED, index * self.chunk, self.chunk)

    def close(self) -> None:
        torch.cuda.synchronize()
        for index in tuple(self._backed):
            self.give_back(index)


class CudaPageRegion:
    """A GPU's: chunks are mapped through the driver at a fixed address."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._memory = DriverMemory(device)
        self.chunk = self._memory.granularity
        self._size = self._memory.round_up(nbytes)
        self._address = self._memory.reserve(self._size)
        self._handles: dict[int, int] = {}
        self.back(0)  # torch asks the driver about the first address
        self.bytes = self._memory.tensor(Export(self._address, self._size))

    def back(self, index: int) -> None:
        if index not in self._handles:
            self._handles[index] = self._memory.map(self._address + index * self.chunk, self.chunk)

    def give_back(self, index: int) -> None:
        handle = self._handles.pop(index, None)
        if handle is not None:
            self._memory.unmap(self._address + index * self.chunk, self.chunk, handle)

    def close(self) -> None:
        torch.cuda.synchronize(self._memory.device)
        for index in tuple(self._handles):
            self.give_back(index)
        self._memory.free(self._address, self._size)
