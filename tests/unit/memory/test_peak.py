from __future__ import annotations

import mmap

import pytest
import torch

from autoglm_lab.memory.high_water import HighWater, _Marks, high_water
from autoglm_lab.memory.peak import PeakMeter, PhasePeaks
from autoglm_lab.units import MiB

CPU = torch.device("cpu")
CLOSE = 6 * MiB


@pytest.fixture
def meter() -> PeakMeter:
    made = PeakMeter(CPU, lambda: None)
    if not high_water(CPU).available:
        pytest.skip("this system keeps no high-water mark")
    return made


def touch(nbytes: int) -> None:
    """Hold memory for a moment. A tensor's may be what other tests have freed and the C library has kept."""
    with mmap.mmap(-1, nbytes) as region:
        for page in range(0, nbytes, mmap.PAGESIZE):
            region[page] = 1


def test_a_phase_s_work_is_what_it_took_above_its_start(meter: PeakMeter) -> None:
    peaks = PhasePeaks()
    held = torch.ones(100 * MiB, dtype=torch.uint8)
    meter.enter("prefill", (peaks,))
    touch(60 * MiB)
    meter.enter("decode", (peaks,))
    touch(20 * MiB)
    meter.enter(None)
    assert abs(peaks.work["prefill"] - 60 * MiB) < CLOSE
    assert abs(peaks.work["decode"] - 20 * MiB) < CLOSE
    assert peaks.process["prefill"] - peaks.process["decode"] == pytest.approx(40 * MiB, abs=CLOSE)
    assert held.numel() == 100 * MiB


def test_the_higher_of_two_phases_of_a_kind_stays(meter: PeakMeter) -> None:
    peaks = PhasePeaks()
    for nbytes in (40 * MiB, 10 * MiB):
        meter.enter("decode", (peaks,))
        touch(nbytes)
        meter.enter(None)
    assert abs(peaks.work["decode"] - 40 * MiB) < CLOSE


def test_a_batch_s_peak_belongs_to_each_of_its_turns(meter: PeakMeter) -> None:
    one, other = PhasePeaks(), PhasePeaks()
    meter.enter("decode", (one, other))
    touch(30 * MiB)
    meter.enter(None)
    assert one == other
    assert one.work["decode"] > 20 * MiB


def test_a_phase_that_begins_meanwhile_takes_nothing_from_who_watches(meter: PeakMeter) -> None:
    marks, peaks = high_water(CPU), PhasePeaks()
    watch = marks.open()
    touch(80 * MiB)
    meter.enter("decode", (peaks,))  # resets the kernel's mark
    touch(10 * MiB)
    meter.enter(None)
    seen = marks.close(watch, None)
    assert abs(seen.work - 80 * MiB) < CLOSE
    assert peaks.work["decode"] < 40 * MiB


def test_a_watch_that_opens_meanwhile_takes_nothing_from_the_phase(meter: PeakMeter) -> None:
    marks, peaks = high_water(CPU), PhasePeaks()
    meter.enter("prefill", (peaks,))
    touch(80 * MiB)
    marks.close(marks.open(), None)
    meter.enter(None)
    assert abs(peaks.work["prefill"] - 80 * MiB) < CLOSE


class Marks(HighWater):
    """A GPU's marks without a GPU: a test says what torch's allocator holds."""

    def __init__(self) -> None:
        self.reserved = self.most = 0
        super().__init__(torch.device("cuda", 0))

    def hold(self, reserved: int) -> None:
        self.reserved, self.most = reserved, max(self.most, reserved)

    def _marks(self) -> _Marks:
        return _Marks(self.reserved, self.most, self.reserved, self.most)

    def _reset(self) -> bool:
        self.most = self.reserved
        return True


@pytest.mark.parametrize(
    ("moves", "peak"),
    [
        ([600, 400, ("slab", 300)], 700),  # the cache had gone when the slab came
        ([600, ("slab", 300), 500], 900),
        ([("slab", 300), 600, ("slab", -300), 700], 900),  # the slab had gone when the allocator took most
        ([("slab", 300), ("slab", -300), 100], 300),
        ([("slab", 300), 200, 100], 500),
    ],
)
def test_the_most_of_allocator_and_slabs_is_of_one_time(moves: list[object], peak: int) -> None:
    marks = Marks()
    early, slabs = marks.open(), 0
    for move in moves:
        if isinstance(move, tuple):
            slabs += move[1]
            marks.moved(move[1])
        else:
            assert isinstance(move, int)
            marks.hold(move)
        marks.close(marks.open(), None)  # another watch takes nothing from this one
    assert marks.close(early, 1000 + marks.reserved + slabs).process == 1000 + peak
