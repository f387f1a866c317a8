"""The first load: told before it begins where it does not fit, and nothing left where it ends early."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import autoglm_lab as lab
from autoglm_lab.errors import LoadError, OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency import residency as residencies
from autoglm_lab.memory.residency import weights
from autoglm_lab.memory.residency.first_load import Far, expected
from autoglm_lab.memory.residency.reader import Progress
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.models.skeleton import model_class
from autoglm_lab.policy import MemoryPolicy
from tests.unit.memory.busy_device import pretend
from tests.unit.memory.conftest import Build, checksums
from tests.unit.models.tiny_models import llava


class Interrupted(BaseException):
    """As Ctrl-C, which the tests' own runner would take for its own."""


def room(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator, nbytes: int) -> None:
    monkeypatch.setattr(accelerator, "headroom", lambda: nbytes - accelerator.reading().slabs)


def slab_bytes(residency: Residency, *names: str) -> int:
    return sum(residency[name].slab_bytes for name in names or residency)


def test_a_load_that_does_not_fit_is_refused_before_a_byte_is_read(
    build: Build, accelerator: Accelerator, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    residency = build()
    room(monkeypatch, accelerator, slab_bytes(residency) - 1)
    with pytest.raises(OutOfMemoryError, match="out of memory in load") as caught:
        residency.materialise()
    assert caught.value.needed == slab_bytes(residency)
    assert caught.value.had == slab_bytes(residency) - 1
    assert events == []
    assert accelerator.reading().slabs == 0
    said = str(caught.value)
    assert "modules={'vision': 'on-demand'}" in said
    assert "dtype='bfloat16'" in said
    assert "policy='auto'" in said


def test_what_it_says_would_fit_fits(build: Build, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    residency = build(policy=MemoryPolicy(modules={"vision": "on-demand"}))
    room(monkeypatch, accelerator, slab_bytes(residency) - 1)
    assert {event.subject for event in residency.materialise()} == {"projector", "text", "head"}


def test_it_promises_nothing_that_would_not_be_enough(
    build: Build, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    residency = build()
    room(monkeypatch, accelerator, slab_bytes(residency, "text") // 3)
    with pytest.raises(OutOfMemoryError) as caught:
        residency.materialise()
    assert "on-demand" not in str(caught.value)
    assert "bfloat16" not in str(caught.value)


def test_a_budget_that_would_be_enough_is_named_and_is(build: Build, accelerator: Accelerator) -> None:
    residency = build()
    accelerator.set_budget(accelerator.context)
    with pytest.raises(OutOfMemoryError, match=r"raise budget='[\d.]+ \wiB'") as caught:
        residency.materialise()
    enough = next(one for one in caught.value.remedies if one.startswith("raise budget="))
    accelerator.set_budget(MemoryPolicy(budget=enough.partition("'")[2].rstrip("'")).budget)
    try:
        assert len(residency.materialise()) == len(residency)
    finally:
        accelerator.set_budget(None)


def damaged(folder: Path, target: Path) -> Path:
    """A copy of the saved model whose last shard is cut once its header was read."""
    tensors = load_file(folder / "model.safetensors")
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_workbench_whose_file_is_cut_while_it_loads_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, opened = damaged(folder, tmp_path), list[Residency]()
    threads = set(threading.enumerate())

    class Cut(Residency):
        def materialise(self, **settings: bool | None) -> list[Event]:
            opened.append(self)
            path = copy / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-200_000])
            return super().materialise(**settings)

    from autoglm_lab import workbench

    monkeypatch.setattr(workbench, "Residency", Cut)
    with pytest.raises(LoadError, match=r"model\.safetensors became shorter"):
        lab.load(copy, device="cpu")
    assert list(opened[0].holdings()) == []
    assert opened[0].mover.staging.held == 0
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_interrupted_load_leaves_nothing(
    kind: str, folder: Path, build: Build, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set(threading.enumerate())
    if kind == "cuda":
        pretend(monkeypatch, accelerator)
    residency = build(policy=MemoryPolicy(modules={"vision": "on-demand"}))
    fill, filled = weights.fill_all, list[int]()

    def interrupted(*given: object) -> None:
        *others, progress = given

        def count(nbytes: int) -> None:
            filled.append(nbytes)
            progress(nbytes)  # type: ignore[operator]
            if len(filled) == 3:
                raise Interrupted

        fill(*others, count)  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "fill_all", interrupted)
    with pytest.raises(Interrupted):
        residency.materialise()
    residency.close()
    assert accelerator.reading().slabs == 0
    assert residency.pinned.used == 0
    assert list(residency.holdings()) == []
    assert set(threading.enumerate()) <= threads


def test_a_module_on_demand_is_read_straight_into_its_pinned_copy(
    build: Build, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = build()
    reference.materialise()
    sums = checksums(reference)
    device = pretend(monkeypatch, accelerator)
    residency = build(policy=MemoryPolicy(modules={"vision": "on-demand"}))
    residency.materialise()
    residency.settle()
    vision = residency["vision"]
    assert vision.place == "host"
    assert vision.backing.filled == vision.nbytes
    assert (device.fetched, device.brought) == (0, 0)
    vision.wake().result(10)
    assert checksums(residency) == sums


def test_how_far_a_load_is_ends_at_what_was_expected(
    build: Build, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, accelerator)
    policy = MemoryPolicy(modules={"vision": "on-demand", "head": "off"})
    residency = build(policy=policy)
    modules = list(residency.values())
    total, far, seen = expected(modules, policy), Far(modules), list[tuple[str, int]]()
    assert total == sum(module.nbytes for module in modules if module.name != "head")
    fill = weights.fill_all

    def watched(targets: object, sources: object, staging: object, progress: Progress) -> None:
        def count(nbytes: int) -> None:
            progress(nbytes)
            seen.append(far())

        fill(targets, sources, staging, count)  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "fill_all", watched)
    residency.materialise()
    residency.settle()
    assert far() == ("", total)
    assert any("text" in name for name, _ in seen)


def test_a_closed_model_s_mover_has_no_thread(
    build: Build, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, accelerator)
    residency = build()
    residency.materialise()
    assert any(thread.name == "autoglm-lab mover" for thread in threading.enumerate())
    residency.close()
    assert residencies.Mover is not None
    assert not any(thread.name == "autoglm-lab mover" for thread in threading.enumerate())


def test_weights_are_cast_as_they_are_read(folder: Path) -> None:
    expected_values = model_class(llava()).from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    with lab.load(folder, dtype="bfloat16", device="cpu") as wb:
        values = wb.model.state_dict()
        wrong = [name for name in values if not torch.equal(values[name], expected_values[name])]
        kinds = {value.dtype for value in values.values()}
        del values
    assert (wrong, kinds) == ([], {torch.bfloat16})
