from __future__ import annotations

import pytest
import torch

from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.high_water import high_water
from autoglm_lab.training.step_peaks import StepPeaks

CPU = torch.device("cpu")
MiB = 1 << 20


@pytest.mark.skipif(not high_water(CPU).available, reason="this system keeps no high-water marks")
def test_both_passes_count_from_where_the_micro_batch_began() -> None:
    open_accelerator("cpu").give_back()  # else what earlier tests freed may go back to the system meanwhile
    peaks = StepPeaks(CPU)
    peaks.enter("forward")
    kept = torch.ones(64 * MiB, dtype=torch.uint8)
    peaks.enter("backward")
    more = torch.ones(32 * MiB, dtype=torch.uint8)
    peaks.enter("")
    assert peaks.most["forward"] >= kept.nbytes - 8 * MiB
    assert peaks.most["backward"] >= kept.nbytes + more.nbytes - 8 * MiB
    seen = dict(peaks.most)
    del kept, more
    peaks.enter("forward")
    peaks.enter("")
    assert peaks.most == seen  # a smaller one changes nothing


def test_on_a_gpu_the_pass_under_way_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = StepPeaks(CPU)
    peaks._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 5000)
    assert list(peaks.holdings()) == []
    peaks._pass, peaks._start = "backward", 1000
    (row,) = peaks.holdings()
    assert (row.name, row.kind, row.nbytes, row.within) == ("activations", "activations", 4000, "allocator")
    assert row.counts == "tensors made since the micro-batch began whose backward pass is under way"


def test_on_a_cpu_there_is_no_such_row() -> None:
    peaks = StepPeaks(CPU)
    peaks._pass = "forward"
    assert list(peaks.holdings()) == []
