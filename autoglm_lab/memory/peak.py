"""The most bytes the process held during a phase, exact to the allocation: a poll would miss a short peak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMeter:
    """Peaks by phase. One thread enters phases; the peaks belong to whoever passed the dictionaries.

    On CUDA: the process's bytes with the allocator's reserved bytes at their peak. On a CPU under Linux: the kernel's
    high-water mark of resident memory less what is backed by files. Elsewhere there are no peaks.

    Args:
        device: the device that is measured.
        process: bytes the process holds on it now, or None where that is hidden.
    """

    def __init__(self, device: torch.device, process: Callable[[], int | None]) -> None:
        self._device, self._process = device, process
        self._phase: str | None = None
        self._peaks: tuple[dict[str, int], ...] = ()
        self.available = device.type == "cuda" or _reset_high_water()

    def enter(self, phase: str | None, peaks: tuple[dict[str, int], ...] = ()) -> None:
        """End the phase under way, writing its peak, and begin ``phase``; None only ends.

        Args:
            peaks: where the peak of ``phase`` is to be written: one for each turn of a batch.
        """
        same = phase == self._phase and [*map(id, peaks)] == [*map(id, self._peaks)]
        if not self.available or same:
            return
        measured = self._read() if self._phase is not None and self._peaks else None
        if measured is not None and self._phase is not None:
            for kept in self._peaks:
                kept[self._phase] = max(measured, kept.get(self._phase, 0))
        self._phase, self._peaks = phase, peaks
        if phase is not None:
            self._begin()

    def _begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _reset_high_water()

    def _read(self) -> int | None:
        if self._device.type == "cuda":
            process = self._process()
            stats: dict[str, Any] = torch.cuda.memory_stats(self._device)
            growth = stats["reserved_bytes.all.peak"] - stats["reserved_bytes.all.current"]
            return None if process is None else process + int(growth)
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        high, file, shared = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssFile", "RssShmem"))
        return high - file - shared


def _reset_high_water() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()
