"""A slab on a CUDA device, mapped through the driver's virtual memory at an address that never changes."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from autoglm_lab.errors import ModuleError
from autoglm_lab.memory.cuda_driver import DriverMemory, Export
from autoglm_lab.memory.residency.slab import SlabInUseError


class CudaSlab:
    """A slab of one GPU's memory. Sizes are rounded up to the driver's granularity (2 MiB).

    Attributes:
        address: the same from the first commit until `close`.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device, self._memory = device, DriverMemory(device)
        self.size = self._memory.round_up(nbytes)
        self.address = 0
        self._handle = 0
        self._keep: Tensor | None = None

    @property
    def committed(self) -> int:
        return self.size if self._handle else 0

    def commit(self) -> Tensor:
        if self._handle:
            raise ModuleError("this memory is already taken")
        if not self.address:
            self.address = self._memory.reserve(self.size)
        self._handle = self._memory.map(self.address, self.size)
        try:
            return self.region()
        except BaseException:
            self.drop()
            raise

    def region(self) -> Tensor:
        if not self._handle:
            raise ModuleError("this memory was given back")
        if self._keep is None:
            export = Export(self.address, self.size)
            self._exported = weakref.ref(export)
            self._keep = self._memory.tensor(export)
        return self._keep

    def alias(self) -> Tensor:
        if not self._handle:
            raise ModuleError("this memory was given back")
        return self._memory.tensor(Export(self.address, self.size))

    def seal(self) -> None:
        if self._keep is None:
            return
        self._keep = None
        if self._exported() is not None:
            gc.collect()  # a cycle may hold the last view
        export = self._exported()
        if export is not None:
            self._keep = self._memory.tensor(export)
            raise SlabInUseError("a tensor outside the model still views these weights")

    def drop(self) -> None:
        if self._handle:
            handle, self._handle, self._keep = self._handle, 0, None
            self._memory.unmap(self.address, self.size, handle)

    def release(self) -> None:
        if not self._handle:
            return
        self.seal()
        # Kernels of any stream may still read the region, and unmapping does not wait for them.
        torch.cuda.synchronize(self._device)
        self.drop()

    def close(self) -> None:
        self.release()
        if self.address:
            self._memory.free(self.address, self.size)
            self.address = 0
