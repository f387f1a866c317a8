"""The host as the device: this process's anonymous memory, and the limit that it lives under."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from pathlib import Path

import psutil

from autoglm_lab.memory.reading import Reading

_STATM, _MEMINFO = Path("/proc/self/statm"), Path("/proc/meminfo")
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class HostMachine:
    """The host's figures. Bytes throughout.

    Attributes:
        context: what the process held when this was made, with what could be given back given back.
        notes: what this system cannot tell.
    """

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
        self._quick = _STATM.exists() and _MEMINFO.exists()
        gc.collect()
        self.trim()
        self.context = self.process_bytes()

    def process_bytes(self) -> int:
        """Resident memory less what is shared or backed by files."""
        if self._quick:
            fields = _read(_STATM, 128).split()
            return (int(fields[1]) - int(fields[2])) * _PAGE
        figures = self._process.memory_info()
        return int(figures.rss - getattr(figures, "shared", 0))

    def reading(self, slabs: int) -> Reading:
        free = _available() if self._quick else int(psutil.virtual_memory().available)
        if self._limit is not None and self._group is not None:
            free = min(free, self._limit - _cgroup_use(self._group))
        free = max(0, free)
        return Reading(time.time(), self.total, free, self.total - free, self.process_bytes(), slabs=slabs)

    def trim(self) -> None:
        """Give the C allocator's free pages back (glibc; elsewhere the system does as it likes)."""
        libc = _libc()
        if libc is not None:
            libc.malloc_trim(0)


def host_memory() -> tuple[int, int]:
    """Bytes of the host that this process may use at most, and how many of them anyone could still take."""
    machine, (limit, group) = psutil.virtual_memory(), _cgroup()
    if limit is None or group is None:
        return int(machine.total), int(machine.available)
    return min(int(machine.total), limit), max(0, min(int(machine.available), limit - _cgroup_use(group)))


def _available() -> int:
    """What the kernel says can be had without swapping; psutil reads the same line, and every other one too."""
    text = _read(_MEMINFO, 512)
    start = text.find(b"MemAvailable:")
    if start < 0:  # a kernel before 3.14
        return int(psutil.virtual_memory().available)
    return int(text[start + 13 :].split(None, 1)[0]) * 1024


def _read(path: Path, size: int) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.read(handle, size)
    finally:
        os.close(handle)


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
