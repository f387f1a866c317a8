from __future__ import annotations

import mmap

import pytest
import torch

from autoglm_lab.memory.high_water import high_water
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
