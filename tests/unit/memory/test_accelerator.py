from __future__ import annotations

import psutil
import pytest
import torch

from autoglm_lab.errors import LabError
from autoglm_lab.memory.accelerator import Accelerator, open_accelerator
from autoglm_lab.units import MiB


def test_the_cpu_counts_this_process_s_anonymous_memory(accelerator: Accelerator) -> None:
    before = accelerator.reading()
    held = torch.ones(200 * MiB, dtype=torch.uint8)
    after = accelerator.reading()
    assert before.process is not None
    assert after.process is not None
    assert abs(after.process - before.process - held.numel()) < 8 * MiB
    assert after.total == accelerator.total <= psutil.virtual_memory().total
    assert after.used + after.free == after.total


def test_a_mapped_file_is_not_counted(accelerator: Accelerator, tmp_path: object) -> None:
    if any("does not tell anonymous memory apart" in note for note in accelerator.notes):
        pytest.skip("this kernel counts mapped files as the process's own")
    path = f"{tmp_path}/file"
    torch.zeros(64 * MiB, dtype=torch.uint8).numpy().tofile(path)
    before = accelerator.reading().process
    mapped = torch.from_file(path, shared=True, size=64 * MiB, dtype=torch.uint8)
    assert int(mapped.sum()) == 0
    after = accelerator.reading().process
    assert before is not None
    assert after is not None
    assert abs(after - before) < 8 * MiB


def test_headroom_is_what_the_budget_leaves(accelerator: Accelerator) -> None:
    process = accelerator.reading().process
    assert process is not None
    assert accelerator.headroom() > 0
    accelerator.set_budget(process + 100 * MiB)
    assert abs(accelerator.headroom() - 100 * MiB) < 8 * MiB
    accelerator.set_budget(process - 50 * MiB)
    assert accelerator.headroom() < 0
    accelerator.set_budget(None)
    assert accelerator.headroom() > 100 * MiB


def test_giving_back_frees_what_the_c_library_kept(accelerator: Accelerator) -> None:
    # Blocks below the C library's mapping threshold stay with it when freed.
    blocks = [torch.ones(50_000, dtype=torch.uint8) for _ in range(4000)]
    kept = blocks[::1000]
    before = accelerator.reading().process
    del blocks
    gained = accelerator.give_back()
    after = accelerator.reading().process
    assert before is not None
    assert after is not None
    assert before - after > 100 * MiB
    assert gained >= 0
    assert len(kept) == 4


@pytest.mark.parametrize("device", ["cuda:99", "cuda:100"])
def test_a_device_that_is_not_there_is_an_error(device: str) -> None:
    with pytest.raises(LabError, match=rf"there is no device {device}: torch .* sees \d+ CUDA devices"):
        open_accelerator(device)


def test_other_kinds_of_device_are_refused() -> None:
    with pytest.raises(LabError, match="memory on 'meta' devices is not measured here: use 'cuda' or 'cpu'"):
        open_accelerator("meta")


def test_without_a_gpu_the_cpu_is_the_device() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert open_accelerator().kind == expected


def test_a_container_s_limit_is_the_total(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    from pathlib import Path

    from autoglm_lab.memory import host_machine as module

    group = Path(str(tmp_path))
    (group / "memory.current").write_text(str(700 * MiB))
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {100 * MiB}\n")
    monkeypatch.setattr(module, "_cgroup", lambda: (1024 * MiB, group))
    opened = open_accelerator("cpu")
    assert opened.total == 1024 * MiB
    assert opened.name == "CPU, memory of this container"
    assert opened.reading().free == 424 * MiB
