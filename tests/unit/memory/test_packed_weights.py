"""Modules in 8 and 4 bits: they come, go, are parked and counted as any other, and compute what their codes say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoglm_lab.errors import LoadError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency import packed_weights
from autoglm_lab.memory.residency.packed_weights import rows_of
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.memory.residency.weights import fill
from autoglm_lab.models.loading import resolve
from autoglm_lab.models.precision import keep_in
from autoglm_lab.models.quantized_linear import QuantizedEmbedding, QuantizedLinear
from autoglm_lab.models.tensor_sources import DummyTensor, HeldTensor, PackedTensor
from autoglm_lab.models.weight_format import WeightFormat
from tests.unit.memory.conftest import IDS, Build, logits
from tests.unit.models.tiny_models import llava

MIXED = {"vision": "int8", "text": "int4", "head": "int8"}
Kept = Callable[..., Residency]


@pytest.fixture
def kept(folder: Path, accelerator: Accelerator, events: list[Event]) -> Iterator[Kept]:
    """The saved model (or one of dummy weights, or another folder) in some precisions, on the device."""
    made: list[Residency] = []

    def make(
        precisions: Mapping[str, str] = MIXED, weights: str | None = None, source: Path | None = None
    ) -> Residency:
        resolved = resolve(llava() if weights else source or folder, weights=weights, device="cpu")
        keep_in(resolved, precisions)
        made.append(Residency(resolved, accelerator, on_event=events.append))
        made[-1].materialise()
        return made[-1]

    yield make
    for residency in made:
        residency.close()


def quantised(residency: Residency) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    return {
        path: module
        for path, module in residency.model.named_modules()
        if isinstance(module, QuantizedLinear | QuantizedEmbedding)
    }


def as_bytes(residency: Residency) -> dict[str, bytes]:
    return {path: module.packed.numpy().tobytes() for path, module in quantised(residency).items()}


@pytest.mark.parametrize("weights", [None, "dummy"])
def test_a_quantised_model_computes_what_its_decoded_weights_do(kept: Kept, build: Build, weights: str | None) -> None:
    ours, plain = kept(weights=weights), build(weights)
    plain.materialise()
    with torch.no_grad():
        for path, module in quantised(ours).items():
            exact, decoded = plain.model.get_submodule(path).weight, module.weight
            error = float((decoded - exact).norm() / exact.norm())
            assert 0 < error < (0.02 if module.form.precision == "int8" else 0.13)
            exact.copy_(decoded)
        pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
        request = {"input_ids": torch.tensor([[5, *[199] * 16, 7]]), "pixel_values": pixels}
        torch.testing.assert_close(ours.model(**request).logits, plain.model(**request).logits, atol=1e-4, rtol=1e-4)
    assert len(quantised(ours)) > 20
    torch.testing.assert_close(logits(ours), logits(plain), atol=1e-4, rtol=1e-4)


def test_parked_to_disk_and_woken_they_are_the_same_to_the_bit(kept: Kept) -> None:
    residency = kept()
    before, answer = as_bytes(residency), logits(residency)
    for name in ("vision", "text", "head"):
        residency[name].park("disk").result()
        assert residency[name].place == "disk"
        (row,) = [row for row in residency[name].holdings() if row.place == "disk"]
        assert 0 < (row.nbytes or 0) <= residency[name].nbytes
    for name in ("vision", "text", "head"):
        residency[name].wake().result()
    assert as_bytes(residency) == before
    assert torch.equal(logits(residency), answer)


def test_the_ledger_counts_what_is_held_and_says_how(kept: Kept, build: Build) -> None:
    residency, plain = kept(), build()
    plain.materialise()
    for name, precision in MIXED.items():
        (row,) = list(residency[name].holdings())
        assert residency[name].nbytes < 0.55 * plain[name].nbytes
        assert residency[name].nbytes <= (row.nbytes or 0) < residency[name].nbytes + 2 * 4096 + 256 * 60
        assert f"weights in {precision}" in row.counts
        assert residency[name].info().dtype == precision
    assert residency["projector"].nbytes == plain["projector"].nbytes


def test_what_comes_from_a_file_equals_what_was_quantised_at_once(kept: Kept, folder: Path) -> None:
    residency = kept()
    stored = load_file(folder / "model.safetensors")
    (name,) = [name for name in stored if name.endswith("layers.1.mlp.down_proj.weight") and "vision" not in name]
    layer = residency.model.model.language_model.layers[1].mlp.down_proj
    packed = torch.zeros(layer.form.nbytes, dtype=torch.uint8)
    layer.form.write(packed, 0, stored[name])
    assert torch.equal(layer.packed, packed)


def test_no_more_than_a_buffer_of_rows_is_there_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    form, rows = WeightFormat.of(100, 64, "int8"), torch.randn(100, 64)
    monkeypatch.setattr(packed_weights, "BUFFER", 30 * 64 * 4)
    seen, told = [], []
    write = WeightFormat.write

    def counted(self: WeightFormat, packed: torch.Tensor, first: int, weights: torch.Tensor) -> None:
        seen.append((first, weights.shape[0]))
        write(self, packed, first, weights)

    monkeypatch.setattr(WeightFormat, "write", counted)
    packed = torch.zeros(form.nbytes, dtype=torch.uint8)
    fill(packed, PackedTensor("w", form, HeldTensor(rows)), told.append)
    assert seen == [(0, 30), (30, 30), (60, 30), (90, 10)]
    assert sum(told) == form.nbytes
    whole = torch.zeros(form.nbytes, dtype=torch.uint8)
    write(form, whole, 0, rows)
    assert torch.equal(packed, whole)


def test_rows_of_made_up_weights_are_the_same_at_each_load(kept: Kept) -> None:
    one, other = kept(weights="dummy"), kept(weights="dummy")
    assert as_bytes(one) == as_bytes(other)
    source = DummyTensor("normal", 0.02, 5)
    assert rows_of(source, 0, 4, 8) == source
    assert rows_of(source, 4, 4, 8) != source


def changed(folder: Path, to: Path, ending: str, value: float) -> Path:
    """A copy of a saved model with one weight replaced."""
    stored = load_file(folder / "model.safetensors")
    (name,) = [name for name in stored if name.endswith(ending) and "vision" not in name]
    stored[name][1, 3] = value
    save_file(stored, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def test_a_weight_that_is_no_number_is_told_with_its_name(kept: Kept, folder: Path, tmp_path: Path) -> None:
    broken = changed(folder, tmp_path, "layers.0.mlp.up_proj.weight", float("inf"))
    with pytest.raises(LoadError, match=r"layers\.0\.mlp\.up_proj\.weight cannot be kept in int4: .*not a finite"):
        kept({"text": "int4"}, source=broken)


def test_a_weight_beyond_float16_is_told_with_its_name(kept: Kept, folder: Path, tmp_path: Path) -> None:
    large = changed(folder, tmp_path, "layers.0.mlp.up_proj.weight", 70_000.0)
    with pytest.raises(LoadError, match=r"layers\.0\.mlp\.up_proj\.weight has numbers beyond 65,504.*in bfloat16"):
        kept({"text": "float16"}, source=large)
    assert logits(kept({"text": "bfloat16"}, source=large)).shape == (1, IDS.shape[1], 200)


def test_modules_are_cast_one_by_one(kept: Kept) -> None:
    residency = kept({"text": "bfloat16", "vision": "float16"})
    assert {name: module.dtype for name, module in residency.items()} == {
        "vision": "float16", "projector": "float32", "text": "bfloat16", "head": "float32",
    }  # fmt: skip
    assert logits(residency).dtype == torch.float32
