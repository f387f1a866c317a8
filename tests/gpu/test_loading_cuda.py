"""Weights read from files to a GPU: through pinned buffers, cast there, and nothing left of a load that ends early."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autoglm_lab.errors import LoadError
from autoglm_lab.memory.residency import reader, weights
from autoglm_lab.memory.residency.staging import Staging
from autoglm_lab.models.checkpoint import FileTensor, read_header

DEVICE = torch.device("cuda:0")


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, FileTensor]:
    torch.manual_seed(0)
    tensors = {f"{name}": torch.randn(rows, 1031).bfloat16() for name, rows in (("a", 5000), ("b", 1), ("c", 900))}
    save_file(tensors, tmp_path / "x.safetensors")
    return read_header(tmp_path / "x.safetensors")


def on_the_device(sources: dict[str, FileTensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.full(one.shape, float("nan"), dtype=dtype, device=DEVICE) for name, one in sources.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("alone", [0, 1 << 40])
def test_values_come_whole_while_buffers_are_used_again(
    sources: dict[str, FileTensor], dtype: torch.dtype, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_ALONE", alone)
    staging = Staging(DEVICE, chunk=1 << 16, lanes=4)
    targets, reference = on_the_device(sources, dtype), {name: torch.empty(one.shape) for name, one in sources.items()}
    weights.fill_all(reference, sources, Staging(torch.device("cpu")), lambda _: None)
    weights.fill_all(targets, sources, staging, lambda _: None)
    torch.cuda.synchronize()
    for name, value in reference.items():
        assert torch.equal(targets[name].cpu(), value.to(dtype)), name
    assert staging.held == 0


def test_a_stream_that_computes_sees_the_values(sources: dict[str, FileTensor]) -> None:
    targets = on_the_device(sources, torch.bfloat16)
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        weights.fill_all(targets, sources, Staging(DEVICE, chunk=1 << 16, lanes=4), lambda _: None)
        sums = {name: target.float().sum().item() for name, target in targets.items()}
    assert not any(math.isnan(value) for value in sums.values())


def test_a_file_that_is_cut_leaves_no_thread_and_no_pinned_buffer(
    sources: dict[str, FileTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_ALONE", 0)
    path, threads = sources["a"].path, set(threading.enumerate())
    path.write_bytes(path.read_bytes()[:-500_000])
    staging = Staging(DEVICE, chunk=1 << 16, lanes=4)
    with pytest.raises(LoadError, match="became shorter"):
        weights.fill_all(on_the_device(sources, torch.bfloat16), sources, staging, lambda _: None)
    assert staging.held == 0
    assert set(threading.enumerate()) <= threads
