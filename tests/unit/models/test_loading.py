from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from autoglm_lab.errors import LoadError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.models.anatomy import named_tensors
from autoglm_lab.models.checkpoint import FileTensor
from autoglm_lab.models.loading import Resolved, adopt, resolve
from autoglm_lab.models.skeleton import model_class
from autoglm_lab.models.tensor_sources import DummyTensor, HeldTensor
from tests.unit.models.tiny_models import FAMILIES, llama, llava

SAVED = ("autoglm", "llava", "gemma3", "glm4v", "qwen2_audio", "omni", "llama")


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    """A tiny model with random weights, saved to ``folder`` by transformers itself."""
    torch.manual_seed(0)
    config = FAMILIES[family](**settings)
    model = model_class(config)(config).to(dtype).eval()
    model.save_pretrained(folder)
    return model


def materialised(resolved: Resolved) -> PreTrainedModel:
    Residency(resolved, open_accelerator("cpu")).materialise()
    return resolved.model


@pytest.mark.parametrize("family", SAVED)
def test_a_saved_model_comes_back_as_from_pretrained_gives_it(family: str, tmp_path: Path) -> None:
    saved = save(family, tmp_path)
    reference = type(saved).from_pretrained(tmp_path)
    model = materialised(resolve(tmp_path, device="cpu"))
    assert type(model) is type(reference)
    assert not model.training
    expected = dict(reference.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
        assert buffer.dtype == expected[name].dtype, name
    values = reference.state_dict()
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()


def test_resolving_reads_no_weights(tmp_path: Path) -> None:
    save("llava", tmp_path)
    resolved = resolve(tmp_path, device="cpu")
    assert all(parameter.is_meta for parameter in resolved.model.parameters())
    assert not any(buffer.is_meta for buffer in resolved.model.buffers())
    assert all(isinstance(source, FileTensor) for source in resolved.sources.values())


def test_a_checkpoint_in_several_files_is_read_from_all(tmp_path: Path) -> None:
    saved = save("llama", tmp_path / "one")
    saved.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    model = materialised(resolve(tmp_path / "many", device="cpu"))
    expected = saved.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_on_cpu_auto_means_float32_whatever_the_file_has(tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    saved = save("llama", tmp_path, torch.bfloat16)
    resolved = resolve(tmp_path, dtype=dtype, device="cpu")
    model = materialised(resolved)
    assert resolved.dtype == expected
    for name, parameter in model.named_parameters():
        assert parameter.dtype == expected
        assert torch.equal(parameter, saved.get_parameter(name).to(expected))
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    save("llama", tmp_path, tie_word_embeddings=True)
    resolved = resolve(tmp_path, device="cpu")
    model = materialised(resolved)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(named_tensors(model))


def test_ties_that_a_file_contradicts_are_not_made(tmp_path: Path) -> None:
    save("llama", tmp_path)  # untied: the head has values of its own
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    stored = load_file(tmp_path / "model.safetensors")
    model = materialised(resolve(tmp_path, device="cpu"))
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])


def test_names_without_the_model_s_prefix_are_understood(tmp_path: Path) -> None:
    saved = save("llama", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in stored.items()}, tmp_path / "model.safetensors")
    model = materialised(resolve(tmp_path, device="cpu"))
    assert torch.equal(model.model.norm.weight, saved.model.norm.weight)
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"1 missing: model\.norm\.weight"),
        (lambda tensors: tensors.update(stray=torch.ones(2)), r"1 unexpected: stray"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"model\.norm\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: object, said: str) -> None:
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=said):
        resolve(tmp_path, device="cpu")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def scribble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, scribble, empty])
def test_a_damaged_file_is_named(tmp_path: Path, damage: object) -> None:
    save("llama", tmp_path)
    damage(tmp_path / "model.safetensors")  # type: ignore[operator]
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        resolve(tmp_path, device="cpu")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    saved = save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        resolve(tmp_path, device="cpu")


def test_remote_code_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling.Evil"}}))
    (tmp_path / "modeling.py").write_text("raise SystemExit('ran')")
    with pytest.raises(LoadError, match="wants to run its own code"):
        resolve(tmp_path, device="cpu")


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    save("llama", tmp_path / "a")
    shutil.move(tmp_path / "a" / "model.safetensors", tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match="points outside its folder"):
        resolve(tmp_path / "a", device="cpu")


def test_what_cannot_be_found_says_what_can() -> None:
    with pytest.raises(LoadError, match=r"no preset of that name; presets: autoglm-tiny"):
        resolve("autoglm-huge")
    with pytest.raises(LoadError, match=r"HF_HUB_OFFLINE is set.*\(hf download some-one/some-model\)"):
        resolve("some-one/some-model")
    with pytest.raises(LoadError, match=r"pass weights='dummy'"):
        resolve(llama())
    with pytest.raises(LoadError, match=r"there is no dtype 'float8': use auto, float32"):
        resolve(llama(), weights="dummy", dtype="float8")


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no config\.json"):
        resolve(tmp_path)


def test_dummy_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        return dict(materialised(resolve(llava(), weights="dummy", seed=seed, device="cpu")).named_parameters())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("layers.0", "layers.1")])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(first[name].mean().item()) < 0.002
    assert torch.equal(first["model.language_model.norm.weight"], torch.ones(64))
    assert first["model.vision_tower.encoder.layers.0.mlp.fc1.bias"].abs().max() == 0


def test_dummy_models_say_so_and_keep_computed_buffers() -> None:
    resolved = resolve(llava(), weights="dummy", device="cpu")
    assert any("made up" in note for note in resolved.notes)
    assert {type(source) for source in resolved.sources.values()} <= {DummyTensor, HeldTensor}
    inv_freq = materialised(resolved).model.language_model.rotary_emb.inv_freq
    assert inv_freq[0] == 1
    assert torch.isfinite(inv_freq).all()


def test_the_embedded_model_has_its_processor() -> None:
    resolved = resolve("autoglm-tiny", device="cpu")
    assert type(resolved.processor).__name__ == "AutoGlmProcessor"
    assert resolved.dtype == torch.float32


def test_a_model_on_the_meta_device_cannot_be_attached() -> None:
    with torch.device("meta"):
        model = model_class(llama())(llama())
    with pytest.raises(LoadError, match="have no values"):
        adopt(model)


def test_the_configuration_that_was_passed_stays_as_it_was() -> None:
    config = llava()
    before = config.to_dict()
    resolve(config, weights="dummy", dtype="bfloat16", device="cpu")
    assert config.to_dict() == before
