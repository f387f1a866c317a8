"""The made-up processor of AutoGLM-Phone-9B's shapes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from PIL import Image

import autoglm_lab as lab
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models import catalog
from autoglm_lab.models.loading import resolve
from autoglm_lab.models.location import processor_of
from autoglm_lab.models.phone_processor import NOTE, phone_processor

SCREEN = Image.radial_gradient("L").resize((1080, 2400)).convert("RGB")


def tiny_phone() -> tf.Glm4vConfig:
    """The public shapes but for the sizes: the same vocabulary, hence the same markers."""
    return tf.Glm4vConfig(
        text_config={
            "vocab_size": 151_552,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
        },
    )


@pytest.fixture(scope="module")
def processor() -> Any:
    return phone_processor(catalog.preset("autoglm-phone-9b").config())


def said(role: str, *parts: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": role, "content": content}


def render(processor: Any, *messages: dict[str, Any], thinking: bool = False) -> Any:
    return processor.apply_chat_template(
        list(messages),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        enable_thinking=thinking,
    )


@pytest.mark.parametrize(("longest", "tokens"), [(28 * 28 * 15_000, 3354), (2_000_000, 1219), (500_000, 286)])
def test_a_phone_screen_takes_as_many_tokens_as_with_the_public_model(longest: int, tokens: int) -> None:
    config = catalog.preset("autoglm-phone-9b").config()
    processor: Any = phone_processor(config)
    processor.image_processor.size = {"shortest_edge": 112 * 112, "longest_edge": longest}
    batch = render(processor, said("user", SCREEN, "Tap the clock"))
    image = batch["input_ids"][0] == config.image_token_id  # type: ignore[attr-defined]
    assert int(image.sum()) == tokens
    assert int(batch["image_grid_thw"].prod()) == 4 * tokens
    assert (batch["mm_token_type_ids"][0] == image.int()).all()


def test_markers_stand_at_the_configurations_ids(processor: Any) -> None:
    config: Any = catalog.preset("autoglm-phone-9b").config()
    ids = render(processor, said("user", SCREEN, "x"))["input_ids"][0].tolist()
    assert ids.index(config.image_start_token_id) + 1 == ids.index(config.image_token_id)
    assert config.image_end_token_id in ids
    assert len(processor.tokenizer) == config.text_config.vocab_size


def test_any_text_and_what_dummy_weights_say_reads_back_as_the_same_ids(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for text in ("Tap the red circle\n\t", "你是谁?", "é 😀 \u200d"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chance = random.Random(0)
    ids = [chance.randrange(256, 151_329) for _ in range(2000)]
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


@pytest.mark.parametrize("thinking", [False, True])
def test_a_history_is_rendered_as_the_beginning_of_the_history_with_one_more_turn(
    processor: Any, thinking: bool
) -> None:
    history = [said("system", "You hold a phone."), said("user", SCREEN, "Open the clock")]
    first = render(processor, *history)["input_ids"][0].tolist()
    more = [*history, said("assistant", "do(action='Tap')"), said("user", "And now?")]
    second = render(processor, *more, thinking=thinking)["input_ids"][0].tolist()
    assert second[: len(first)] == first
    assert processor.tokenizer.decode(second).endswith("<|assistant|>\n" + "<think>" * thinking)


def test_the_phone_preset_has_a_processor_and_says_that_it_is_made_up() -> None:
    resolved = resolve("autoglm-phone-9b", weights="dummy", device="cpu")
    assert resolved.processor is not None
    assert NOTE in resolved.notes


@pytest.fixture
def folder(processor: Any, tmp_path: Path) -> Path:
    """The files of the public repository beside its weights, as transformers writes and names them."""
    tiny_phone().save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor"}
    settings["size"] = {"shortest_edge": 112 * 112, "longest_edge": 500_000}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(processor.chat_template)
    return tmp_path


def test_a_saved_processor_of_the_family_is_built_without_torchvision(processor: Any, folder: Path) -> None:
    found, notes = processor_of(folder)
    assert notes == ()
    asked = said("user", SCREEN, "Tap the clock")
    batch = render(found, asked)
    assert int(batch["image_grid_thw"].prod()) == 4 * 286
    assert found.decode(batch["input_ids"][0]).endswith("Tap the clock<|assistant|>\n")


def test_a_template_in_the_older_file_is_found(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "so {{ messages[0].role }}"}))
    assert processor_of(folder)[0].apply_chat_template([said("user", "x")], tokenize=False) == "so user"


def test_a_broken_file_of_a_processor_becomes_a_note(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{")
    found, notes = processor_of(folder)
    assert found is None
    assert str(folder) in notes[0] and "cannot be built" in notes[0]


@pytest.fixture(scope="module")
def workbench() -> Iterator[lab.Workbench]:
    config = tiny_phone()
    model = tf.Glm4vForConditionalGeneration(config).eval()
    with lab.attach(model, phone_processor(config)) as wb:
        yield wb


def test_a_phone_model_with_dummy_weights_chats_about_an_image(workbench: lab.Workbench) -> None:
    wb = workbench
    screen = SCREEN.resize((224, 448))
    answer = wb.chat("Tap", image=screen, conversation="a", max_new_tokens=8, eos=False).result(60)
    assert answer.usage.image_tokens == 8 * 16
    assert answer.usage.completion_tokens == 8
    batch = render(wb.processor, said("user", screen, "Tap"))
    stock = wb.model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]  # type: ignore[operator]
    assert answer.text == wb.processor.tokenizer.decode(stock, skip_special_tokens=True)
    again = wb.chat("And now?", conversation="a", max_new_tokens=4, eos=False).result(60)
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


def test_a_limit_on_an_image_s_tokens_holds_for_turn_and_plan(workbench: lab.Workbench) -> None:
    screen, free = SCREEN.resize((540, 1200)), workbench.image_tokens(SCREEN.resize((540, 1200)))
    assert free == 817

    def encode(wb: lab.Workbench) -> int:
        phases = wb.plan(None, Workload(900, 4, 1, screen.size), search=False).phases
        return next(phase.of_kind("activations") for phase in phases if phase.name == "encode")

    before = encode(workbench)
    workbench.policy = workbench.policy.replace(max_image_tokens=100)
    limited = workbench.image_tokens(screen)
    assert limited is not None and limited <= 100
    answer = workbench.chat("Tap", image=screen, conversation="small", max_new_tokens=2, eos=False).result(60)
    assert answer.usage.image_tokens == limited
    assert encode(workbench) < before
    workbench.policy = workbench.policy.replace(max_image_tokens=None)
    assert workbench.image_tokens(screen) == free
