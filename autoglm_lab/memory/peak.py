"""The most bytes that a phase held, exact to the allocation: a poll would miss a short peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from autoglm_lab.memory.high_water import Watch, high_water


@dataclass
class PhasePeaks:
    """Peaks by phase, in bytes; where a phase came again, the higher one.

    Attributes:
        process: the most that the process held on the device.
        work: the most that was held beyond what stood when the phase began: its activations, and what stayed of it. On
            CPU, memory that the C library had kept and uses again stood already.
    """

    process: dict[str, int] = field(default_factory=dict)
    work: dict[str, int] = field(default_factory=dict)


class PeakMeter:
    """Peaks by phase. One thread enters phases; the peaks belong to whoever passed them.

    On CUDA: the process's bytes with the allocator's reserved bytes at their peak. On a CPU under Linux: the kernel's
    high-water mark of resident memory less what is backed by files. Elsewhere there are no peaks.

    Args:
        device: the device that is measured.
        process: bytes the process holds on it now, or None where that is hidden.
    """

    def __init__(self, device: torch.device, process: Callable[[], int | None]) -> None:
        self._marks, self._process = high_water(device), process
        self._phase: str | None = None
        self._peaks: tuple[PhasePeaks, ...] = ()
        self._watch: Watch | None = None

    def enter(self, phase: str | None, peaks: tuple[PhasePeaks, ...] = ()) -> None:
        """End the phase under way, writing its peak, and begin ``phase``; None only ends.

        Args:
            peaks: where the peak of ``phase`` is to be written: one for each turn of a batch.
        """
        same = phase == self._phase and [*map(id, peaks)] == [*map(id, self._peaks)]
        if not self._marks.available or same:
            return
        if self._watch is not None and self._phase is not None:
            peak = self._marks.close(self._watch, self._process())
            for kept in self._peaks:
                kept.work[self._phase] = max(peak.work, kept.work.get(self._phase, 0))
                if peak.process is not None:
                    kept.process[self._phase] = max(peak.process, kept.process.get(self._phase, 0))
        self._phase, self._peaks = phase, peaks
        self._watch = None if phase is None else self._marks.open()
