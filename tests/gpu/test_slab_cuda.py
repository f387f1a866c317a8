"""Slabs on a GPU and their copies on the host: addresses, bytes given back, kernels that still read them."""

from __future__ import annotations

import pytest
import torch

from autoglm_lab.memory.residency.cuda_slab import CudaSlab
from autoglm_lab.memory.residency.pinned import PinnedBudget
from autoglm_lab.memory.residency.slab import HostSlab, SlabInUseError
from autoglm_lab.units import MiB
from tests.gpu.conftest import free


def test_a_slab_keeps_its_address_and_gives_its_bytes_back(device: torch.device) -> None:
    slab = CudaSlab(300 * MiB + 1, device)
    assert slab.size >= 300 * MiB + 1
    before = free()
    region = slab.commit()
    assert (region.device, region.dtype, region.numel()) == (device, torch.uint8, slab.size)
    address = region.data_ptr()
    assert before - free() >= slab.size
    region.fill_(3)
    del region
    slab.release()
    assert before - free() < 4 * MiB
    again = slab.commit()
    assert again.data_ptr() == address == slab.address
    again.fill_(5)
    assert int(again[-1]) == 5
    del again
    slab.close()
    assert before - free() < 4 * MiB


def test_a_slab_that_is_viewed_is_not_unmapped(device: torch.device) -> None:
    slab = CudaSlab(4 * MiB, device)
    view = slab.commit()[:1000]
    view.fill_(9)
    with pytest.raises(SlabInUseError):
        slab.release()
    assert int(view.sum()) == 9000
    del view
    slab.close()


def test_a_slab_that_cannot_be_had_leaves_nothing_behind(device: torch.device) -> None:
    before = free()
    slab = CudaSlab(1 << 42, device)  # 4 TiB
    with pytest.raises(MemoryError, match="cuMemCreate failed with 2"):
        slab.commit()
    assert slab.committed == 0
    slab.close()
    assert before - free() < 4 * MiB


def test_releasing_waits_for_kernels_of_every_stream(device: torch.device) -> None:
    slab = CudaSlab(256 * MiB, device)
    weights = slab.commit().view(torch.float32)[: 4096 * 4096].view(4096, 4096)
    weights.fill_(1.0)
    inputs = torch.ones(4096, 4096, dtype=torch.float32, device=device)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(50):
            result = inputs @ weights
    del weights
    slab.release()
    torch.cuda.synchronize()
    assert float(result.min()) == float(result.max()) == 4096.0
    slab.close()


def test_host_copies_are_exact_and_pinned(device: torch.device) -> None:
    nbytes = 33 * MiB + 4096
    budget = PinnedBudget(nbytes)
    host = HostSlab(nbytes, pin=True, budget=budget)
    region = host.commit()
    host.touch()
    host.pin()
    region.fill_(7)
    assert host.pinned, host.note
    assert host.committed == budget.used == nbytes
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target.copy_(region, non_blocking=True)
    assert int(target.sum(dtype=torch.int64)) == 7 * nbytes
    del region
    host.close()
    assert host.committed == budget.used == 0
