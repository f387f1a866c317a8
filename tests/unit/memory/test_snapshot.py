from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda._memory_viz import segment_plot, segsum

import autoglm_lab as lab
from autoglm_lab.errors import LabError
from autoglm_lab.memory.ledger import Ledger, Row
from autoglm_lab.memory.snapshot import snapshot, write_snapshot
from autoglm_lab.units import GiB, MiB

ROWS = (
    Row("text", "weights", "device", 6 * GiB, "weights in bfloat16"),
    Row("vision", "weights", "host", GiB),
    Row("KV main", "kv", "device", 3 * MiB + 5, "keys and values"),
    Row("KV own", "kv", "device", 7 * MiB, within="allocator"),
    Row("workspaces", "owner", "device", 32 * MiB, within="allocator"),
    Row("graphs", "owner", "device", 8 * MiB, within="cache"),
    Row("context", "context", "device", 600 * MiB),
    Row("allocator cache", "allocator cache", "device", GiB),
    Row("unattributed", "unattributed", "device", 5 * MiB),
    Row("free", "free", "device", 10 * GiB),
)


def held(rows: tuple[Row, ...] = ROWS) -> Ledger:
    return Ledger("GPU", 24 * GiB, 8 * GiB, rows, 1.0)


def names(taken: dict[str, Any]) -> list[str]:
    return [segment["blocks"][0]["frames"][0]["name"].split(":")[0] for segment in taken["segments"]]


def test_on_a_gpu_what_torch_does_not_know_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"address": 1 << 46, "total_size": 2 * MiB, "blocks": []}
    monkeypatch.setattr(
        torch.cuda.memory, "_snapshot", lambda: {"segments": [theirs], "device_traces": [["trace"]], "version": 1}
    )
    taken = snapshot(held(), torch.device("cuda", 0))
    assert taken["segments"].pop(0) is theirs
    assert names(taken) == ["text", "KV main", "context"]
    assert taken["device_traces"] == [["trace"]]


def test_the_viewer_s_own_code_reads_it_on_a_cpu(tmp_path: Path) -> None:
    with lab.load("autoglm-tiny", device="cpu") as wb:
        file = wb.snapshot(tmp_path / "memory.pickle")
        process = wb.memory.process
    taken = pickle.loads(file.read_bytes())
    total = sum(segment["total_size"] for segment in taken["segments"])
    assert process is not None
    assert total == pytest.approx(process, abs=16 * MiB)
    assert {"vision", "audio", "text", "context"} <= set(names(taken))
    assert "segment" in segsum(taken)
    assert "<html>" in segment_plot(taken)


def test_segments_never_lie_over_one_another() -> None:
    segments = snapshot(held(), torch.device("cpu"))["segments"]
    ends = [segment["address"] + segment["total_size"] for segment in segments]
    assert all(end < following["address"] for end, following in zip(ends, segments[1:], strict=False))


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"was not written to '.*missing/memory.pickle': No such file or directory"):
        write_snapshot(tmp_path / "missing" / "memory.pickle", {})


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_snapshot(tmp_path / "memory.pickle", {"segments": []})
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pickle, "dump", full)
    with pytest.raises(LabError, match="No space left on device"):
        write_snapshot(file, {})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["memory.pickle"]
