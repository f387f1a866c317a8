"""One device: how much memory it has, who holds it, how much this process may use.

CUDA is read through NVML and the allocator's counters; where there is no GPU, the device is the host and this process's
anonymous memory counts. Nothing here synchronises the device.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from autoglm_lab.errors import LabError
from autoglm_lab.memory.nvml import NvmlDevice, visible_device


@dataclass(frozen=True)
class Reading:
    """The figures of one device at one time, in bytes.

    Attributes:
        total: of the device; on CPU the machine's, or the cgroup's limit where that is lower.
        free: what anyone could still take.
        used: held by all processes, without what the driver keeps to itself.
        process: held by this process; None: the machine hides it.
        driver_reserved: kept by the driver; None: not told.
        allocated: in tensors of torch's device allocator; None on CPU.
        reserved: held by that allocator, allocated or cached; None on CPU.
        slabs: held by weights outside that allocator.
    """

    time: float
    total: int
    free: int
    used: int
    process: int | None
    driver_reserved: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    slabs: int = 0


class Accelerator:
    """One device of this process. Open it before anything large is allocated: `context` is read then.

    Attributes:
        context: bytes that the process held on the device before it held anything of ours.
        notes: what this machine cannot tell, one sentence each.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
        self.budget: int | None = None
        self.notes: tuple[str, ...] = ()
        self._slabs = 0
        self._lock = threading.Lock()
        self._machine: _CudaMachine | _HostMachine
        self._machine = _CudaMachine(device) if self.kind == "cuda" else _HostMachine()
        self.name, self.total, self.context = self._machine.name, self._machine.total, self._machine.context
        self.notes = self._machine.notes

    @property
    def context_counts(self) -> str:
        """What `context` is, in a sentence."""
        if self.kind == "cuda":
            return "CUDA context and libraries of this process, read once before the first allocation"
        return "Python and its libraries when the workbench started (anonymous memory), read once"

    def reading(self) -> Reading:
        """The device's figures now. Cheap: some 0.1 ms on CPU."""
        return self._machine.reading(self._slabs, self.context)

    def read_context(self) -> None:
        """Read `context` anew: what the process holds now, without weights and without torch's allocator."""
        gc.collect()
        if self.kind == "cpu":
            self._machine.trim()
        reading = self.reading()
        if reading.process is not None:
            self.context = reading.process - reading.slabs - (reading.reserved or 0)

    def headroom(self) -> int:
        """Bytes that this process may still take on the device: what is free, and no more than its budget leaves.

        On CUDA, what the allocator caches counts as available to the allocator but not here.
        """
        reading = self.reading()
        if self.budget is None or reading.process is None:
            return reading.free
        return min(reading.free, self.budget - reading.process)

    def set_budget(self, nbytes: int | None) -> None:
        """Cap what this process may use on the device, its context and weights included; None: the whole device.

        On CUDA the allocator itself refuses to go beyond. On CPU the kernel does not enforce it: weights are checked
        against it when they come in, and the engine checks between its steps.
        """
        self.budget = nbytes
        self._apply_budget()

    def hold(self, nbytes: int) -> None:
        """Count bytes of weights that are mapped (positive) or given back (negative) outside the allocator."""
        with self._lock:
            self._slabs += nbytes
        if self.budget is not None:
            self._apply_budget()

    def give_back(self) -> int:
        """Return cached, unused memory to the system.

        Returns:
            bytes that really left this process on the device, as the driver or the kernel reports them.
        """
        before = self.reading()
        gc.collect()
        self._machine.trim()
        after = self.reading()
        if before.process is None or after.process is None:
            return after.free - before.free
        return before.process - after.process

    def _apply_budget(self) -> None:
        if isinstance(self._machine, _CudaMachine):
            left = None if self.budget is None else self.budget - self._slabs - self.context
            self._machine.cap_allocator(left)


def open_accelerator(device: str | torch.device | None = None) -> Accelerator:
    """The device to work on.

    Args:
        device: None: ``cuda:0`` if there is one, else ``cpu``.

    Raises:
        LabError: the device does not exist here, or is neither CUDA nor the CPU.
    """
    chosen = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        chosen = torch.device("cuda", chosen.index or 0)
        if (chosen.index or 0) >= count:
            raise LabError(f"there is no device {chosen}: torch {torch.__version__} sees {count} CUDA devices here")
    elif chosen.type != "cpu":
        raise LabError(f"memory on {chosen.type!r} devices is not measured here: use 'cuda' or 'cpu'")
    return Accelerator(chosen)


class _HostMachine:
    """The host as the device: this process's anonymous memory."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._limit, self._group = _cgroup()
        machine = psutil.virtual_memory().total
        self.total = min(machine, self._limit or machine)
        where = "this container" if self.total < machine else "this machine"
        self.name = f"CPU, memory of {where}"
        self.notes: tuple[str, ...] = ()
        if not getattr(self._process.memory_info(), "shared", 0):  # not Linux, or a sandbox that counts less
            self.notes = ("this system does not tell anonymous memory apart: the process's resident memory is counted",)
        gc.collect()
        self.trim()
        self.context = self._held()

    def _held(self) -> int:
        figures = self._process.memory_info()
        return int(figures.rss - getattr(figures, "shared", 0))

    def reading(self, slabs: int, context: int) -> Reading:
        del context
        free = int(psutil.virtual_memory().available)
        if self._limit is not None and self._group is not None:
            free = min(free, self._limit - _cgroup_use(self._group))
        free = max(0, free)
        return Reading(time.time(), self.total, free, self.total - free, self._held(), slabs=slabs)

    def trim(self) -> None:
        """Give the C allocator's free pages back (glibc; elsewhere the system does as it likes)."""
        libc = _libc()
        if libc is not None:
            libc.malloc_trim(0)


class _CudaMachine:
    """A GPU: NVML for the device and the process, torch for its allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        index = device.index or 0
        fresh = not torch.cuda.is_initialized()
        self._nvml, note = NvmlDevice.open(visible_device(index))
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
        process = None if self._nvml is None else self._nvml.process_bytes()
        self._hidden = process is None
        if process is not None:
            self.context = process - int(torch.cuda.memory_reserved(device))
        else:
            self.context = 0 if before is None else used - before
        notes = [note] if note else []
        if self._hidden:
            notes.append(
                "the driver hides what single processes hold here (a container, perhaps): this process is counted as "
                "its allocator, its weights and a context "
                + ("measured on the whole device" if before is not None else "of unknown size, shown as 0")
            )
        self.notes = tuple(notes)

    def _device_figures(self) -> tuple[int, int, int, int | None]:
        """Total, free, used, and what the driver keeps."""
        if self._nvml is not None:
            return self._nvml.memory()
        free, total = torch.cuda.mem_get_info(self._device)
        return total, free, total - free, None

    def reading(self, slabs: int, context: int) -> Reading:
        total, free, used, kept = self._device_figures()
        stats = torch.cuda.memory_stats(self._device)
        reserved = int(stats.get("reserved_bytes.all.current", 0))
        allocated = int(stats.get("allocated_bytes.all.current", 0))
        process = self._nvml.process_bytes() if self._nvml is not None and not self._hidden else None
        if process is None:
            process = reserved + slabs + context
        return Reading(time.time(), total, free, used, process, kept, allocated, reserved, slabs)

    def cap_allocator(self, nbytes: int | None) -> None:
        fraction = 1.0 if nbytes is None else min(1.0, max(0.0, nbytes / self._allocatable))
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)

    def trim(self) -> None:
        torch.cuda.empty_cache()


def _libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError):  # another C library
        return None
    return libc


def _cgroup() -> tuple[int | None, Path | None]:
    """The memory limit that this process lives under, and the folder that tells its use."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None, None
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folders += [Path("/sys/fs/cgroup") / path.lstrip("/"), Path("/sys/fs/cgroup")]
        elif "memory" in controllers.split(","):
            folders += [Path("/sys/fs/cgroup/memory") / path.lstrip("/"), Path("/sys/fs/cgroup/memory")]
    for folder in folders:
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                text = (folder / name).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if text != "max" and int(text) < 1 << 60:
                return int(text), folder
    return None, None


def _cgroup_use(folder: Path) -> int:
    """Bytes in use under a limit, without file pages that the kernel would drop first."""
    try:
        name = "memory.current" if (folder / "memory.current").exists() else "memory.usage_in_bytes"
        held = int((folder / name).read_text(encoding="ascii"))
        for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
            key, value = line.split()
            if key == "inactive_file":
                return held - int(value)
    except (OSError, ValueError):
        return 0
    return held
