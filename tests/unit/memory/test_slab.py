from __future__ import annotations

import mmap

import pytest
import torch

from autoglm_lab.memory.residency.slab import ALIGNMENT, HostSlab, SlabInUseError, lay_out, views_of


def test_a_slab_is_whole_pages_and_can_be_taken_again() -> None:
    slab = HostSlab(mmap.PAGESIZE + 1)
    assert (slab.size, slab.committed) == (2 * mmap.PAGESIZE, 0)
    for value in (1, 2):
        region = slab.commit()
        assert int(region.sum()) == 0
        region.fill_(value)
        assert slab.committed == slab.size
        del region
        slab.release()
        assert slab.committed == 0
    slab.close()


def test_a_slab_that_is_viewed_stays_and_its_values_with_it() -> None:
    slab = HostSlab(4096)
    view = slab.commit()[100:200]
    view.fill_(7)
    with pytest.raises(SlabInUseError):
        slab.release()
    assert int(slab.region()[100:200].sum()) == 700
    view.fill_(8)
    assert int(slab.region()[100:200].sum()) == 800
    del view
    slab.release()


def test_a_view_in_a_cycle_does_not_keep_a_slab() -> None:
    slab = HostSlab(4096)
    cycle: list[object] = [slab.commit()[:10]]
    cycle.append(cycle)
    del cycle
    slab.release()
    assert slab.committed == 0


def test_views_are_aligned_disjoint_and_keep_strides() -> None:
    tensors = {
        "odd": torch.randn(3, 5),
        "turned": torch.randn(4, 6).t(),
        "half": torch.randn(7).half(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "spread": torch.ones(1).expand(4),
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    views, nbytes = lay_out(tensors)
    slab = HostSlab(nbytes)
    start = slab.commit().data_ptr()
    placed = views_of(slab.region(), views)
    for name, tensor in tensors.items():
        placed[name].copy_(tensor)
    for name, tensor in tensors.items():
        assert torch.equal(placed[name], tensor), name
        assert placed[name].dtype == tensor.dtype
        assert views[name].offset % ALIGNMENT == 0
        assert tensor.numel() == 0 or placed[name].data_ptr() == start + views[name].offset
    assert placed["turned"].stride() == tensors["turned"].stride()
    assert placed["channels"].is_contiguous(memory_format=torch.channels_last)
    assert placed["spread"].is_contiguous()
    del placed
    slab.close()
