"""Blocks of the prompt in every way to generate, and what users of transformers expect of a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    DynamicCache,
    StaticCache,
)
from transformers.initialization import no_init_weights

from autoglm_lab.models.autoglm import AutoGlmForConditionalGeneration, AutoGlmModel, AutoGlmProcessor

Message = dict[str, Any]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


@pytest.fixture
def dialogue(screen: Image.Image, tone: NDArray[np.float32]) -> list[Message]:
    parts = [
        {"type": "image", "image": screen},
        {"type": "audio", "audio": tone},
        {"type": "text", "text": "Tap the red circle"},
    ]
    return [{"role": "system", "content": "Tap"}, {"role": "user", "content": parts}]


def encode(processor: AutoGlmProcessor, messages: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(messages, **settings, processor_kwargs={"padding": True}, **kwargs))


@torch.no_grad()
def by_hand(model: AutoGlmForConditionalGeneration, inputs: dict[str, torch.Tensor], steps: int = 8) -> torch.Tensor:
    """Logits [steps, vocab] of greedy decoding without a cache and without generate: the whole prompt at every step."""
    inputs = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    told = []
    for _ in range(steps):
        told.append(model(**inputs, use_cache=False).logits[0, -1])
        token = told[-1].argmax(-1)[None, None]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], -1)
        inputs["block_sequence_ids"] = torch.nn.functional.pad(inputs["block_sequence_ids"], (0, 1), value=-1)
    return torch.stack(told)


def generated_logits(model: AutoGlmForConditionalGeneration, **settings: Any) -> torch.Tensor:
    """Logits [batch, steps, vocab] that generate saw."""
    told = model.generate(**settings, **GREEDY, output_logits=True, return_dict_in_generate=True)
    return torch.stack(told.logits, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_attends_as_the_blocks_say(
    autoglm_model: AutoGlmForConditionalGeneration,
    autoglm_processor: AutoGlmProcessor,
    dialogue: list[Message],
    attention: str,
) -> None:
    model, inputs = autoglm_model, encode(autoglm_processor, dialogue)
    model.set_attn_implementation(attention)
    expected = by_hand(model, inputs)
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.testing.assert_close(generated_logits(model, **inputs, **settings)[0], expected, atol=1e-3, rtol=1e-3)
    causal = {name: tensor for name, tensor in inputs.items() if name != "block_sequence_ids"}
    assert not torch.allclose(model(**causal).logits[0, -1], model(**inputs).logits[0, -1], atol=1e-2)


def test_a_user_turn_sees_itself_both_ways_and_nothing_later(
    autoglm_model: AutoGlmForConditionalGeneration, autoglm_processor: AutoGlmProcessor
) -> None:
    messages = [
        {"role": "user", "content": "Tap the red circle"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "What is the code?"},
    ]
    inputs = encode(autoglm_processor, messages)
    model, ids, turns = autoglm_model, inputs["input_ids"], inputs["block_sequence_ids"][0]
    before = model(**inputs, output_hidden_states=True).hidden_states[-1][0]

    def moved(position: int) -> torch.Tensor:
        """Which positions notice another token at `position`."""
        changed = {**inputs, "input_ids": ids.clone()}
        changed["input_ids"][0, position] = 200
        after = model(**changed, output_hidden_states=True).hidden_states[-1][0]
        return (after - before).abs().amax(-1) > 1e-5

    first, second = (turns == 0).nonzero().flatten(), (turns == 1).nonzero().flatten()
    assert moved(int(first[-1])).nonzero().flatten().tolist() == list(range(int(first[0]), len(turns)))
    assert moved(int(second[-1])).nonzero().flatten().tolist() == list(range(int(second[0]), len(turns)))
    answer = int(first[-1]) + 3
    assert moved(answer).nonzero().flatten().tolist() == list(range(answer, len(turns)))
    model.config.bidirectional_prompt = False
    before = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    assert moved(int(first[-1])).nonzero().flatten().tolist() == list(range(int(first[-1]), len(turns)))


def test_a_second_turn_on_kept_keys_and_values_equals_a_recompute(
    autoglm_model: AutoGlmForConditionalGeneration,
    autoglm_processor: AutoGlmProcessor,
    dialogue: list[Message],
) -> None:
    model = autoglm_model
    longer = [*dialogue, {"role": "assistant", "content": "Tap"}, {"role": "user", "content": "What is the code?"}]
    first = encode(autoglm_processor, dialogue)
    whole = encode(autoglm_processor, longer)
    length = first["input_ids"].shape[1]
    assert whole["input_ids"][0, :length].tolist() == first["input_ids"][0].tolist()
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**first, past_key_values=cache, use_cache=True)
    expected = generated_logits(model, **whole)
    text = {name: whole[name] for name in ("input_ids", "attention_mask", "block_sequence_ids")}
    for inputs in (text, whole):
        reused = generated_logits(model, **inputs, past_key_values=copy.deepcopy(cache))
        torch.testing.assert_close(reused, expected, atol=1e-3, rtol=1e-3)


def test_a_kept_prefix_takes_only_the_new_features(
    autoglm_model: AutoGlmForConditionalGeneration,
    autoglm_processor: AutoGlmProcessor,
    dialogue: list[Message],
    screen: Image.Image,
) -> None:
    model = autoglm_model
    again = {"role": "user", "content": [{"type": "image", "image": screen.rotate(180)}]}
    first, whole = encode(autoglm_processor, dialogue), encode(autoglm_processor, [*dialogue, again])
    assert whole["pixel_values"].shape[0] == 2
    cache = DynamicCache(config=model.config.get_text_config())
    prompt = {name: tensor[:, : first["input_ids"].shape[1] - 3] for name, tensor in first.items() if tensor.ndim == 2}
    media = {name: tensor for name, tensor in first.items() if name not in prompt}
    prompt.pop("input_features_mask")
    media["input_features_mask"] = first["input_features_mask"]
    model(**prompt, **media, past_key_values=cache, use_cache=True)
    reused = generated_logits(model, **whole, past_key_values=cache)
    torch.testing.assert_close(reused, generated_logits(model, **whole), atol=1e-3, rtol=1e-3)


def test_a_block_is_never_prefilled_in_two_pieces(
    autoglm_model: AutoGlmForConditionalGeneration, autoglm_processor: AutoGlmProcessor
) -> None:
    messages = [
        {"role": "system", "content": "Tap the red circle" * 9},
        {"role": "user", "content": "What is the code?"},
    ]
    inputs = encode(autoglm_processor, messages)
    start = inputs["block_sequence_ids"][0].tolist().index(0)
    with pytest.raises(ValueError, match=rf"stops at token {start + 2}, inside a bidirectional block"):
        autoglm_model.generate(**inputs, prefill_chunk_size=start + 2, **GREEDY)
    expected = generated_logits(autoglm_model, **inputs)
    chunked = generated_logits(autoglm_model, **inputs, prefill_chunk_size=start)
    torch.testing.assert_close(chunked, expected, atol=1e-3, rtol=1e-3)


def test_a_forward_can_be_planned_on_fake_tensors(autoglm_model: AutoGlmForConditionalGeneration) -> None:
    with FakeTensorMode(), no_init_weights():
        fake = AutoGlmForConditionalGeneration(autoglm_model.config)
        ids = torch.zeros(1, 100, dtype=torch.long)
        media = {"pixel_values": torch.zeros(1, 3, 224, 224), "input_features": torch.zeros(1, 105, 80)}
        assert fake(input_ids=ids, block_sequence_ids=ids, **media).logits.shape == (1, 100, 400)


def test_left_padded_prompts_answer_as_they_do_alone(
    autoglm_model: AutoGlmForConditionalGeneration,
    autoglm_processor: AutoGlmProcessor,
    dialogue: list[Message],
    screen: Image.Image,
    tone: NDArray[np.float32],
) -> None:
    media = [{"type": "image", "image": screen.rotate(90)}, {"type": "image", "image": screen}]
    media += [{"type": "audio", "audio": -tone[:5000]}, {"type": "audio", "audio": tone[:9000]}]
    dialogues = [
        dialogue,
        [{"role": "user", "content": "What is the code?"}],
        [{"role": "user", "content": [*media, {"type": "text", "text": "Tap"}]}],
    ]
    together = encode(autoglm_processor, dialogues)
    assert together["attention_mask"][1, 0] == 0
    beams = {"num_beams": 2}
    for settings in ({}, {"cache_implementation": "static"}, beams, {**beams, "use_cache": False}):
        width = settings.get("num_beams", 1)
        generated = generated_logits(autoglm_model, **together, **settings)[:, :3]
        for row, alone in enumerate(dialogues):
            expected = generated_logits(autoglm_model, **encode(autoglm_processor, alone), **settings)[:, :3]
            rows = generated[row * width : (row + 1) * width]
            torch.testing.assert_close(rows, expected, atol=1e-3, rtol=1e-3)


def test_embeds_give_the_same_answer_as_ids(
    autoglm_model: AutoGlmForConditionalGeneration, autoglm_processor: AutoGlmProcessor, dialogue: list[Message]
) -> None:
    model, inputs = autoglm_model, encode(autoglm_processor, dialogue)
    expected = generated_logits(model, **inputs)
    rest = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for settings in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        told = generated_logits(model, inputs_embeds=embeds, **rest, **settings)
        torch.testing.assert_close(told, expected, atol=1e-3, rtol=1e-3)


def test_features_encoded_before_give_the_same_logits(
    autoglm_model: AutoGlmForConditionalGeneration, autoglm_processor: AutoGlmProcessor, dialogue: list[Message]
) -> None:
    model, inputs = autoglm_model, encode(autoglm_processor, dialogue)
    expected = model(**inputs).logits
    image = model.get_image_features(inputs.pop("pixel_values"))
    audio = model.get_audio_features(inputs.pop("input_features"), inputs.pop("input_features_mask"))
    encoded = {"image": image, "audio": audio}
    torch.testing.assert_close(model(**inputs, mm_encoder_outputs=encoded).logits, expected)
    before = copy.copy(encoded)
    model.generate(**inputs, mm_encoder_outputs=encoded, **GREEDY)
    assert encoded == before


@pytest.mark.parametrize("helper", ["assistant", "lookup"])
def test_assisted_decoding_changes_nothing(
    autoglm_model: AutoGlmForConditionalGeneration,
    autoglm_processor: AutoGlmProcessor,
    dialogue: list[Message],
    helper: str,
) -> None:
    inputs = encode(autoglm_processor, dialogue)
    expected = autoglm_model.generate(**inputs, **GREEDY).tolist()
    other = copy.deepcopy(autoglm_model)
    settings: dict[str, Any] = {"assistant_model": other} if helper == "assistant" else {"prompt_lookup_num_tokens": 3}
    assert autoglm_model.generate(**inputs, **GREEDY, **settings).tolist() == expected


def test_a_static_cache_of_ones_own_can_be_filled(
    autoglm_model: AutoGlmForConditionalGeneration, autoglm_processor: AutoGlmProcessor
) -> None:
    inputs = encode(autoglm_processor, [{"role": "user", "content": "Tap the red circle"}])
    cache = StaticCache(config=autoglm_model.config.get_text_config(), max_cache_len=64)
    expected = generated_logits(autoglm_model, **inputs)
    filled = generated_logits(autoglm_model, **inputs, past_key_values=cache)
    torch.testing.assert_close(filled, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_placeholders_without_features_are_an_error(
    autoglm_model: AutoGlmForConditionalGeneration,
    autoglm_processor: AutoGlmProcessor,
    dialogue: list[Message],
    modality: str,
) -> None:
    inputs = encode(autoglm_processor, dialogue)
    token = autoglm_processor.image_token_id if modality == "image" else autoglm_processor.audio_token_id
    where = (inputs["input_ids"][0] == token).nonzero()[0, 0]
    inputs["input_ids"][0, where] = 300
    count, given = (48, 49) if modality == "image" else (13, 14)
    with pytest.raises(ValueError, match=f"{count} {modality} placeholder tokens .* give {given} features"):
        autoglm_model(**inputs)


def test_flash_attention_with_blocks_is_an_error(autoglm_model: AutoGlmForConditionalGeneration) -> None:
    autoglm_model.config.text_config._attn_implementation_internal = "flash_attention_2"
    blocks = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"set config\.bidirectional_prompt=False"):
        autoglm_model(input_ids=torch.full((1, 3), 20), block_sequence_ids=blocks)


def test_saved_and_loaded_it_is_the_same_model(
    autoglm_model: AutoGlmForConditionalGeneration,
    autoglm_processor: AutoGlmProcessor,
    dialogue: list[Message],
    tmp_path: Path,
) -> None:
    autoglm_model.save_pretrained(tmp_path)
    kept = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert kept == {**autoglm_model.config.to_dict(), "_name_or_path": str(tmp_path)}
    inputs = encode(autoglm_processor, dialogue)
    expected = autoglm_model(**inputs).logits
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path, device_map="cpu").eval()
        assert type(loaded) is AutoGlmForConditionalGeneration
        assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
        assert torch.equal(loaded(**inputs).logits, expected)
    assert type(AutoModel.from_pretrained(tmp_path)) is AutoGlmModel


def test_its_parts_are_where_transformers_looks(autoglm_model: AutoGlmForConditionalGeneration) -> None:
    inner = autoglm_model.model
    assert autoglm_model.get_encoder("image") is inner.vision_tower
    assert autoglm_model.get_encoder("audio") is inner.audio_tower
    assert autoglm_model.get_decoder() is inner.language_model
    assert autoglm_model.get_input_embeddings() is inner.language_model.embed_tokens
    features = inner.vision_tower(torch.zeros(2, 3, 224, 224)).pooler_output
    assert features.shape == (2, 49, 512)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(
    autoglm_model: AutoGlmForConditionalGeneration,
    autoglm_processor: AutoGlmProcessor,
    dialogue: list[Message],
    reentrant: bool,
) -> None:
    model, inputs = autoglm_model.train(), encode(autoglm_processor, dialogue)
    labels = inputs["input_ids"]
    model(**inputs, labels=labels).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        torch.testing.assert_close(weight.grad, expected[name], atol=1e-3, rtol=1e-3)
