from __future__ import annotations

import pytest
import torch

from autoglm_lab.memory.allocator_setting import expand_segments


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that has not started; what its allocator was told."""
    settings: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    return settings


def test_it_is_set_before_the_allocator_has_memory(told: list[str]) -> None:
    assert expand_segments() == ""
    assert told == ["expandable_segments:True"]
    assert expand_segments("cuda") == ""
    assert len(told) == 1


def test_other_settings_stay(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "roundup_power2_divisions:[256:1,>:2],expandable_segments:False")
    assert expand_segments() == ""
    assert told == ["roundup_power2_divisions:[256:1,>:2],expandable_segments:True"]


@pytest.mark.parametrize(("reserved", "late"), [(0, False), (2 << 20, True)])
def test_it_is_too_late_once_the_allocator_has_memory(
    told: list[str], monkeypatch: pytest.MonkeyPatch, reserved: int, late: bool
) -> None:
    """CUDA may have started: importing torchao starts it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: reserved)
    said = expand_segments()
    assert ("comes too late: torch has memory in this process. Restart the kernel" in said) is late
    assert told == ([] if late else ["expandable_segments:True"])


def test_what_the_environment_has_set_is_in_effect_after_the_start(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert expand_segments() == ""


def test_on_a_cpu_it_says_that_it_has_no_effect(told: list[str]) -> None:
    assert expand_segments("cpu").startswith("reclaim.expandable_segments has no effect on a CPU")
    assert told == []
