"""A budget on a GPU: the process never goes over it, whatever torch caches and however pages lie in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.peak import PeakMeter, PhasePeaks
from autoglm_lab.units import MiB


@pytest.fixture
def pool(accelerator: Accelerator) -> Iterator[KvPool]:
    pool = KvPool(PageFormat(layers=40, kv_heads=2, head_dim=128, dtype=torch.bfloat16), accelerator)
    yield pool
    pool.close()
    accelerator.set_budget(None)


def process(accelerator: Accelerator) -> int:
    held = accelerator.reading().process
    if held is None:
        pytest.skip("the driver hides what a process holds")
    return held


def fill(pool: KvPool) -> None:
    while True:
        pool.take(1)


def test_pages_take_what_torch_only_caches(accelerator: Accelerator, pool: KvPool) -> None:
    cached = torch.empty(512 * MiB, dtype=torch.uint8, device=accelerator.device)
    del cached
    accelerator.set_budget(process(accelerator) + 32 * MiB)
    pool.take(256 * MiB // pool.page_bytes)
    assert process(accelerator) <= (accelerator.budget or 0)


def test_pages_that_do_not_fill_their_chunks_stay_under_the_budget(accelerator: Accelerator, pool: KvPool) -> None:
    torch.cuda.empty_cache()
    accelerator.set_budget(process(accelerator) + 33 * MiB)
    with pytest.raises(OutOfMemoryError):
        fill(pool)
    assert process(accelerator) <= (accelerator.budget or 0)
    assert pool.backed >= 24 * MiB


def test_a_step_leaves_room_for_kernels_that_are_not_counted_yet(accelerator: Accelerator, pool: KvPool) -> None:
    torch.cuda.empty_cache()
    accelerator.set_budget(process(accelerator) + 64 * MiB)
    for _ in range(2):
        held = []
        with accelerator.growth("kernels of encoders"), contextlib.suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(2 * MiB, dtype=torch.uint8, device=accelerator.device))
        assert len(held) >= 16
        assert process(accelerator) <= (accelerator.budget or 0) - 4 * MiB
        held.clear()
        torch.cuda.empty_cache()


def test_a_peak_is_not_what_was_held_one_after_the_other(accelerator: Accelerator, pool: KvPool) -> None:
    peaks = PhasePeaks()
    meter = PeakMeter(accelerator.device, lambda: process(accelerator))
    torch.cuda.empty_cache()
    before = process(accelerator)
    meter.enter("prefill", (peaks,))
    work = torch.empty(512 * MiB, dtype=torch.uint8, device=accelerator.device)
    del work
    torch.cuda.empty_cache()
    pool.take(400 * MiB // pool.page_bytes)
    meter.enter(None)
    assert 500 * MiB < peaks.process["prefill"] - before < 560 * MiB
