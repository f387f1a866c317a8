from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoglm_lab.memory.residency import weights
from autoglm_lab.models.checkpoint import read_header
from autoglm_lab.models.tensor_sources import DummyTensor


def test_what_is_written_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.randn(4, 6).bfloat16().t(),
        "c": torch.tensor([True, False, True]),
        "d": torch.tensor(5),
        "e": torch.empty(0, 2),
    }
    placed = weights.write(tmp_path / "x.safetensors", tensors)
    stored = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert placed == read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_reading_casts_and_counts(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    value = torch.randn(300, 7).to(stored)
    save_file({"pad": torch.ones(3), "x": value}, tmp_path / "x.safetensors")
    source = read_header(tmp_path / "x.safetensors")["x"]
    target = torch.empty(300, 7, dtype=wanted)
    counted: list[int] = []
    weights.fill(target, source, counted.append)
    assert torch.equal(target, value.to(wanted))
    assert sum(counted) == target.numel() * target.element_size()


def test_casting_goes_chunk_by_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    value = torch.randn(70, 33).bfloat16()
    save_file({"x": value}, tmp_path / "x.safetensors")
    source = read_header(tmp_path / "x.safetensors")["x"]
    for target in (torch.empty(70, 33), torch.empty(70, 33, dtype=torch.bfloat16), torch.empty(33, 70).t()):
        counted: list[int] = []
        weights.fill(target, source, counted.append)
        assert torch.equal(target, value.to(target.dtype))
        assert sum(counted) == target.numel() * target.element_size()


def test_made_up_values_look_normal_over_many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.empty(9_000_000)
    weights.fill(target, DummyTensor("normal", 0.5, seed=3), lambda _: None)
    assert target.std().item() == pytest.approx(0.5, rel=0.01)
    assert target.mean().abs().item() < 0.002
    assert torch.isfinite(target).all()
    turned = torch.empty(20, 30).t()
    weights.fill(turned, DummyTensor("normal", 1.0, seed=3), lambda _: None)
    assert torch.unique(turned).numel() > 300
    weights.drop_pool()
