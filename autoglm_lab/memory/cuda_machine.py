"""A GPU as the device: NVML for the device and the process, torch for its allocator."""

from __future__ import annotations

import time

import torch

from autoglm_lab.memory.nvml import NvmlDevice, visible_device
from autoglm_lab.memory.reading import Reading

# What cuBLAS took, by device: it stays until the process ends, whoever measured it.
_workspaces: dict[int, int] = {}


class CudaMachine:
    """One GPU's figures. Bytes throughout; nothing here waits for the device, except `trim`.

    Attributes:
        context: what the process held before torch's allocator held anything.
        notes: what this machine cannot tell.
        hidden: whether the driver hides what single processes hold.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = device.index or 0
        fresh = not torch.cuda.is_initialized()
        self._nvml, note = NvmlDevice.open(visible_device(self._index))
        before = self._device_figures()[2] if fresh and self._nvml is not None else None
        properties = torch.cuda.get_device_properties(device)
        torch.cuda.mem_get_info(device)  # makes the context, if there is none yet
        self.name = str(properties.name)
        uuid = str(getattr(properties, "uuid", ""))
        if uuid and self._nvml is not None:
            self._nvml = NvmlDevice.open(uuid)[0] or self._nvml  # surer than an index, which may count otherwise
        self.total, _, used, _ = self._device_figures()
        # torch's own total is what its cap is a fraction of; NVML's also counts what the driver keeps.
        self._allocatable = int(torch.cuda.mem_get_info(device)[1])
        process = self.process_bytes()
        self.hidden = process is None
        if process is not None:
            self.context = process - int(torch.cuda.memory_reserved(device))
        else:
            self.context = 0 if before is None else used - before
        notes = [note] if note else []
        if self.hidden:
            notes.append(
                "the driver hides what single processes hold here (a container, perhaps): this process is counted as "
                "its allocator, its weights and a context "
                + ("measured on the whole device" if before is not None else "of unknown size, shown as 0")
                + "; what CUDA takes later shows under other processes"
            )
        self.notes = tuple(notes)

    def process_bytes(self) -> int | None:
        """What the driver says this process holds; None where it does not say."""
        return None if self._nvml is None else self._nvml.process_bytes()

    def allocator(self) -> tuple[int, int]:
        """Bytes that torch's allocator has in tensors, and that it holds."""
        stats = torch.cuda.memory_stats_as_nested_dict(self._index)
        return stats["allocated_bytes"]["all"]["current"], stats["reserved_bytes"]["all"]["current"]

    def reading(self, slabs: int, taken: int) -> Reading:
        """Args:
        taken: by the driver for this process, counted where the process's own figure is hidden.
        """
        total, free, used, kept = self._device_figures()
        allocated, reserved = self.allocator()
        process = None if self.hidden else self.process_bytes()
        if process is None:
            process = reserved + slabs + taken
        return Reading(time.time(), total, free, used, process, kept, allocated, reserved, slabs)

    def cap_allocator(self, nbytes: int | None) -> None:
        """Let torch's allocator hold at most this; None: whatever there is."""
        fraction = 1.0 if nbytes is None else min(1.0, max(0.0, nbytes / self._allocatable))
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)

    def trim(self) -> None:
        torch.cuda.empty_cache()

    @property
    def workspaces(self) -> int:
        """What cuBLAS keeps in torch's allocator, as far as it was measured by `take_workspaces`."""
        return _workspaces.get(self._index, 0)

    def take_workspaces(self) -> None:
        """Let cuBLAS and cuBLASLt take the workspaces of this thread and its current stream, and count them.

        They come from torch's allocator at the first product, belong to no tensor, and stay (32 MiB on Hopper).
        """
        before, _ = self.allocator()
        with torch.no_grad():
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                square = torch.ones(64, 64, device=self._device, dtype=dtype)
                torch.mm(square, square)
                torch.addmm(square[0], square, square)  # with a bias: cuBLASLt
                del square
        after, _ = self.allocator()
        _workspaces[self._index] = self.workspaces + max(0, after - before)

    def _device_figures(self) -> tuple[int, int, int, int | None]:
        """Total, free, used, and what the driver keeps."""
        if self._nvml is not None:
            return self._nvml.memory()
        free, total = torch.cuda.mem_get_info(self._device)
        return total, free, total - free, None
