from __future__ import annotations

import pytest
import torch
import transformers as tf

from autoglm_lab.models.anatomy import ORDER, anatomy, named_tensors
from autoglm_lab.models.skeleton import skeleton
from tests.unit.models.tiny_models import FAMILIES, TEXT, VISION

EXPECTED = {
    "autoglm": ("vision", "audio", "projector", "text"),
    "llava": ("vision", "projector", "text", "head"),
    "gemma3": ("vision", "projector", "text"),
    "glm4v": ("vision", "text", "head"),
    "qwen2_audio": ("audio", "projector", "text", "head"),
    "idefics3": ("vision", "projector", "text", "head"),
    "omni": ("vision", "audio", "text", "head"),
    "whisper": ("audio", "text"),
    "llama": ("text", "head"),
}


def names_of(config: tf.PreTrainedConfig) -> tuple[str, ...]:
    return tuple(spec.name for spec in anatomy(skeleton(config, torch.float32)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_apart_into_its_modules(family: str) -> None:
    assert names_of(FAMILIES[family]()) == EXPECTED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_belongs_to_exactly_one_module(family: str) -> None:
    model = skeleton(FAMILIES[family](), torch.float32)
    specs = anatomy(model)
    tensors = dict(named_tensors(model))
    assert sorted(name for spec in specs for name in spec.tensors) == sorted(tensors)
    assert {id(parameter) for parameter in model.parameters()} <= {id(tensors[n]) for s in specs for n in s.tensors}
    assert [spec.name for spec in specs] == [name for name in ORDER if name in {spec.name for spec in specs}]
    for spec in specs:
        assert spec.nbytes == sum(tensors[name].numel() * tensors[name].element_size() for name in spec.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_roots_hold_all_of_a_module_and_nothing_else(family: str) -> None:
    model = skeleton(FAMILIES[family](), torch.float32)
    tensors = dict(named_tensors(model))
    for spec in anatomy(model):
        own = {id(tensors[name]) for name in spec.tensors}
        under = {id(tensor) for root in spec.roots for _, tensor in named_tensors(model.get_submodule(root))}
        assert under == own


def test_the_merger_of_a_vision_tower_stays_with_it() -> None:
    vision = anatomy(skeleton(FAMILIES["glm4v"](), torch.float32))[0]
    assert any("merger" in name for name in vision.tensors)


def test_the_public_phone_model_has_the_parameters_that_its_authors_count() -> None:
    from autoglm_lab.models import catalog

    model = skeleton(catalog.preset("autoglm-phone-9b").config(), torch.bfloat16)
    assert {spec.name: spec.nbytes // 2 for spec in anatomy(model)} == {
        "vision": 892_498_432,
        "text": 8_779_522_048,
        "head": 620_756_992,
    }


def test_a_tied_head_belongs_to_the_text() -> None:
    assert names_of(FAMILIES["llama"](tie_word_embeddings=True)) == ("text",)


def test_encoders_that_the_library_does_not_find_are_found_by_their_configuration() -> None:
    config = tf.Phi4MultimodalConfig(
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vision_config={**VISION, "image_size": 448, "crop_size": 448},
        audio_config={"hidden_size": 64, "intermediate_size": 64, "num_blocks": 1, "num_attention_heads": 4},
    )
    assert names_of(config) == ORDER


def test_a_tensor_of_no_clear_module_is_text_with_a_note() -> None:
    config = tf.CLIPConfig(
        text_config={**TEXT, "projection_dim": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        vision_config={**VISION, "projection_dim": 32},
        projection_dim=32,
    )
    text = next(spec for spec in anatomy(skeleton(config, torch.float32)) if spec.name == "text")
    assert "logit_scale" in text.tensors
    assert text.note == "1 tensors of no clear module are counted here, for example logit_scale"


def test_a_plain_torch_module_is_all_text() -> None:
    (spec,) = anatomy(torch.nn.Linear(3, 4))
    assert (spec.name, spec.nbytes, spec.roots) == ("text", 64, ("",))
