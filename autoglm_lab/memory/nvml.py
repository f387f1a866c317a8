"""NVML: what the driver says of one GPU and of this process on it."""

from __future__ import annotations

import os
from typing import Any


class NvmlDevice:
    """One GPU as NVML knows it. Bytes throughout."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._pid = os.getpid()

    @classmethod
    def open(cls, which: str) -> tuple[NvmlDevice | None, str]:
        """The device of this index or UUID, and a note where NVML does not give it."""
        try:
            import pynvml
        except ImportError:
            return None, "nvidia-ml-py is not installed: figures of other processes are missing"
        try:
            pynvml.nvmlInit()
            if which.isdigit():
                return cls(pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(which))), ""
            spelled = which if which.startswith(("GPU-", "MIG-")) else f"GPU-{which}"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(spelled)), ""
        except pynvml.NVMLError as error:
            return None, f"NVML does not answer ({error}): figures of other processes are missing"

    def memory(self) -> tuple[int, int, int, int | None]:
        """Total, free, used by processes, kept by the driver (None where this driver does not tell it apart)."""
        try:
            figures = self._nvml.nvmlDeviceGetMemoryInfo(self._handle, version=self._nvml.nvmlMemory_v2)
            return int(figures.total), int(figures.free), int(figures.used), int(figures.reserved)
        except (self._nvml.NVMLError, AttributeError, TypeError):
            figures = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            return int(figures.total), int(figures.free), int(figures.used), None

    def process_bytes(self) -> int | None:
        """What this process holds; None where the driver hides it, as in many containers."""
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return None
        for process in processes:
            if process.pid == self._pid and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None


def visible_device(index: int) -> str:
    """NVML's index or UUID of what CUDA calls device ``index``, as far as the environment tells before CUDA starts."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return visible[index] if index < len(visible) else str(index)
