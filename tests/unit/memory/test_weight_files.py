"""Files behind parked weights: those that the model came from, and those that parking writes."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from autoglm_lab.errors import LoadError, ModuleError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency.residency import Residency, in_memory
from autoglm_lab.models.loading import resolve
from autoglm_lab.models.skeleton import model_class
from tests.unit.memory.conftest import Build, logits
from tests.unit.models.tiny_models import llama


def test_weights_of_files_are_not_written_again(loaded: Residency, events: list[Event]) -> None:
    loaded["text"].park()
    assert "spilled" not in [event.kind for event in events]
    assert events[-1].why == "to disk"


def test_a_full_disk_leaves_the_module_where_it_was(build: Build) -> None:
    residency = build("dummy")
    residency.materialise()
    expected = logits(residency)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ModuleError, match=r"cannot write 339\.2 KiB of weights to .*Make room there"):
            residency["text"].park()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert residency["text"].place == "device"
    assert torch.equal(logits(residency), expected)


def test_closing_removes_what_was_written(build: Build, events: list[Event]) -> None:
    residency = build("dummy")
    residency.materialise()
    residency["text"].park()
    folder = Path(next(event.why for event in events if event.kind == "spilled").rsplit(" in ", 1)[1])
    assert list(folder.iterdir())
    residency.close()
    residency.close()
    assert not folder.exists()
    with pytest.raises(ModuleError, match="load it again"):
        residency["text"].wake()


def test_a_file_that_vanished_leaves_the_module_parked(accelerator: Accelerator, tmp_path: Path) -> None:
    config = llama()
    model_class(config)(config).save_pretrained(tmp_path)
    residency = Residency(resolve(tmp_path, device="cpu"), accelerator)
    residency.materialise()
    residency["text"].park()
    held = accelerator.reading().slabs
    (tmp_path / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(LoadError, match=r"cannot read the weights in .*model\.safetensors"):
        residency["text"].wake()
    assert residency["text"].place == "disk"
    assert accelerator.reading().slabs == held
    (tmp_path / "away").rename(tmp_path / "model.safetensors")
    residency["text"].wake()
    residency.close()
    assert accelerator.reading().slabs == 0


def test_a_file_that_became_shorter_is_named_and_gives_the_memory_back(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    config = llama()
    model_class(config)(config).save_pretrained(tmp_path)
    residency = Residency(resolve(tmp_path, device="cpu"), accelerator)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(LoadError, match=r"model\.safetensors became shorter"):
        residency["text"].wake()
    assert accelerator.reading().slabs == 0
    assert next(iter(residency["text"].holdings())).place == "disk"
    residency.close()


def test_a_temporary_folder_in_memory_is_recognised() -> None:
    mounts = "/dev/sda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/sdb /tmp/disk ext4 rw 0 0\n"
    assert in_memory(Path("/tmp"), mounts)
    assert in_memory(Path("/tmp/a/b"), mounts)
    assert not in_memory(Path("/tmp/disk/a"), mounts)
    assert not in_memory(Path("/var/tmp"), mounts)
    assert not in_memory(Path("/tmpfiles"), mounts)
