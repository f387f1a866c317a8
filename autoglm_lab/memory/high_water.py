"""The high-water marks of one device, shared: whoever resets the counters behind them resets them for everyone.

Here alone they are reset. Several may watch at a time, a phase of the engine and a cell of a notebook, and each gets
the peak of its own time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_FIELDS = ("VmHWM", "RssAnon", "RssFile", "RssShmem")
_devices: dict[torch.device, HighWater] = {}
_devices_lock = threading.Lock()


@dataclass
class Watch:
    """The time from when it was opened until it is read. Bytes.

    Attributes:
        start: held when it was opened: in tensors on CUDA, anonymous on CPU.
        most: of that, at any time since.
        reserved: the most by torch's allocator since slabs last came or went; 0 on CPU.
        together: the most of what that and slabs held, up to then.
    """

    start: int
    most: int
    reserved: int
    together: int = 0


@dataclass(frozen=True)
class Peak:
    """What a watch saw, in bytes.

    Attributes:
        process: the most that the process held on the device; None: hidden.
        work: the most that was held beyond what stood at the start: activations, mostly.
    """

    process: int | None
    work: int


@dataclass(frozen=True)
class _Marks:
    held: int
    most: int
    reserved: int = 0
    most_reserved: int = 0


class HighWater:
    """The marks of one device. Get it from `high_water`; from any thread.

    Attributes:
        available: whether this system keeps such marks: CUDA's allocator does, and the kernel of Linux.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._watches: list[Watch] = []
        self._slabs = 0
        self.available = device.type == "cuda" or self._reset()

    def open(self) -> Watch:
        """Watch from now on."""
        with self._lock:
            marks = self._marks()
            for other in self._watches:
                _raise(other, marks)
            self._reset()
            watch = Watch(marks.held, marks.held, marks.reserved)
            self._watches.append(watch)
            return watch

    def moved(self, nbytes: int) -> None:
        """Note memory outside torch's allocator that came (positive) or went: its peak and theirs are of one time."""
        if self._device.type != "cuda":
            return
        with self._lock:
            if self._watches:
                marks = self._marks()
                for watch in self._watches:
                    _raise(watch, marks)
                    watch.together = max(watch.together, watch.reserved + self._slabs)
                    watch.reserved = marks.reserved
                self._reset()
            self._slabs += nbytes

    def close(self, watch: Watch, process: int | None) -> Peak:
        """The peak since ``watch`` was opened; it watches no longer.

        Args:
            process: bytes that the process holds now; None: hidden.
        """
        with self._lock:
            marks = self._marks()
            _raise(watch, marks)
            self._watches = [other for other in self._watches if other is not watch]
            now = marks.reserved + self._slabs
            over = max(watch.together, watch.reserved + self._slabs) - now
        work = max(0, watch.most - watch.start)
        if self._device.type != "cuda":
            return Peak(watch.most, work)
        return Peak(None if process is None else process + max(0, over), work)

    def _marks(self) -> _Marks:
        if self._device.type == "cuda":
            stats = torch.cuda.memory_stats_as_nested_dict(self._device)
            held, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
            return _Marks(held["current"], held["peak"], reserved["current"], reserved["peak"])
        found = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if line.startswith(_FIELDS))
        high, held, file, shared = (int(found[name].split()[0]) * 1024 for name in _FIELDS)
        return _Marks(held, max(held, high - file - shared))

    def _reset(self) -> bool:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            return False
        return _STATUS.exists()


def high_water(device: torch.device) -> HighWater:
    """The marks of a device: one for all of this process."""
    with _devices_lock:
        if device not in _devices:
            _devices[device] = HighWater(device)
        return _devices[device]


def _raise(watch: Watch, marks: _Marks) -> None:
    watch.most = max(watch.most, marks.most)
    watch.reserved = max(watch.reserved, marks.most_reserved)
