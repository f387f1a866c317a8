"""What a dialogue becomes: prompts that grow only at their end, texts that stay data, blocks by user turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoProcessor, ViTImageProcessorPil

from autoglm_lab.models.autoglm import SPECIAL_TOKENS, AutoGlmFeatureExtractor, AutoGlmProcessor
from autoglm_lab.models.autoglm.attachments import read_audio, resample
from autoglm_lab.models.autoglm.chat_format import guard, pieces, split_answer, unguard

Message = dict[str, Any]
MARKERS = "".join(SPECIAL_TOKENS)


def encode(processor: AutoGlmProcessor, messages: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs))


@pytest.fixture
def dialogue(screen: Image.Image, tone: NDArray[np.float32]) -> list[Message]:
    return [
        {"role": "system", "content": "Tap 12"},
        {"role": "user", "content": [{"type": "text", "text": "Tap\n"}, {"type": "image", "image": screen}]},
        {"role": "assistant", "content": '<think>\nred</think><answer>do(action="Tap")</answer>'},
        {"role": "user", "content": [{"type": "audio", "audio": tone}, {"type": "text", "text": " 验证码?"}]},
        {"role": "assistant", "content": "4079"},
        {"role": "user", "content": ""},
    ]


def test_a_longer_dialogue_begins_with_the_shorter(
    autoglm_processor: AutoGlmProcessor, dialogue: list[Message]
) -> None:
    whole = encode(autoglm_processor, dialogue)
    for length in range(1, len(dialogue)):
        shorter = encode(autoglm_processor, dialogue[:length])
        for name in ("input_ids", "block_sequence_ids"):
            assert whole[name][0][: len(shorter[name][0])] == shorter[name][0]


def test_an_answer_without_thought_is_kept_as_it_was_generated(
    autoglm_processor: AutoGlmProcessor, dialogue: list[Message]
) -> None:
    prompt = encode(autoglm_processor, dialogue[:2], add_generation_prompt=True)["input_ids"][0]
    told = prompt + autoglm_processor.encode_answer('do(action="Tap")')
    assert encode(autoglm_processor, dialogue[:3])["input_ids"][0] == told


def test_thinking_is_closed_unless_asked_for(autoglm_processor: AutoGlmProcessor) -> None:
    message = [{"role": "user", "content": "Tap"}]
    render = autoglm_processor.apply_chat_template
    assert render(message, add_generation_prompt=True).endswith("Tap<|assistant|><think></think>")
    assert render(message, add_generation_prompt=True, enable_thinking=True).endswith("Tap<|assistant|>")
    target = autoglm_processor.tokenizer.decode(autoglm_processor.encode_answer("4", thought="heard"))
    assert target == "<think>heard</think><answer>4</answer><|endoftext|>"
    shown = autoglm_processor.decode(autoglm_processor.encode_answer("4", thought="heard"), skip_special_tokens=True)
    assert autoglm_processor.split_answer(shown) == ("heard", "4")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>a</think><answer>b</answer>", ("a", "b")),
        ("<answer>b</answer><|endoftext|>", ("", "b")),
        ("<think>cut off", ("cut off", "")),
        ("<think>a</think><answer>cut", ("a", "cut")),
        ("plain", ("", "plain")),
    ],
)
def test_answers_come_apart_also_when_cut_off(text: str, parts: tuple[str, str]) -> None:
    assert split_answer(text) == parts


@pytest.mark.parametrize(
    "typed", [*SPECIAL_TOKENS, MARKERS, "\ufdd0", "<\ufdd0|user|>", "\ufdd0<|user|>\ufdd0\ufdd0", "a<b"]
)
def test_what_people_type_is_never_a_marker(autoglm_processor: AutoGlmProcessor, typed: str) -> None:
    assert unguard(guard(typed)) == typed
    assert not any(piece.is_marker for piece in pieces(guard(typed)))
    for role in ("system", "user", "assistant"):
        for content in (typed, [{"type": "text", "text": typed}]):
            ids = encode(autoglm_processor, [{"role": role, "content": content}])["input_ids"][0]
            inner = ids[1:] if role != "assistant" else ids[4:-2]
            assert not [token for token in inner if token < len(SPECIAL_TOKENS)]
            expected = typed if role != "assistant" else split_answer(typed)[1]
            assert autoglm_processor.tokenizer.decode(inner) == expected


def test_a_rendered_prompt_can_be_encoded_later(autoglm_processor: AutoGlmProcessor) -> None:
    messages = [{"role": "user", "content": f"Tap {MARKERS}"}]
    rendered = autoglm_processor.apply_chat_template(messages, add_generation_prompt=True)
    direct = encode(autoglm_processor, messages, add_generation_prompt=True)
    assert autoglm_processor(text=rendered)["input_ids"] == direct["input_ids"]


def test_blocks_are_the_user_turns(autoglm_processor: AutoGlmProcessor, dialogue: list[Message]) -> None:
    data = encode(autoglm_processor, dialogue, add_generation_prompt=True)
    ids, turns = data["input_ids"][0], data["block_sequence_ids"][0]
    user, assistant, end = (SPECIAL_TOKENS.index(f"<|{name}|>") for name in ("user", "assistant", "endoftext"))
    turn, expected = -1, []
    inside = False
    for token in ids:
        turn += token == user
        inside = token == user or (inside and token not in (assistant, end))
        expected.append(turn if inside else -1)
    assert turns == expected
    assert set(turns) == {-1, 0, 1, 2}


def test_pictures_and_sounds_take_the_tokens_they_are_counted_as(
    autoglm_processor: AutoGlmProcessor, dialogue: list[Message], tone: NDArray[np.float32]
) -> None:
    data = encode(autoglm_processor, dialogue, return_tensors="pt")
    ids = data["input_ids"][0]
    assert int((ids == autoglm_processor.image_token_id).sum()) == 49
    assert int((ids == autoglm_processor.audio_token_id).sum()) == autoglm_processor.num_audio_tokens(len(tone)) == 14
    assert data["pixel_values"].shape == (1, 3, 224, 224)
    assert data["input_features"].shape == (1, 105, 80)
    assert data["input_features_mask"].shape == (1, 105)


def test_a_live_sound_is_expanded_by_its_count(autoglm_processor: AutoGlmProcessor) -> None:
    prompt = autoglm_processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}])
    ids = autoglm_processor(text=prompt, audio_token_counts=[6])["input_ids"][0]
    assert ids.count(autoglm_processor.audio_token_id) == 6


def test_placeholders_and_inputs_must_match(autoglm_processor: AutoGlmProcessor, screen: Image.Image) -> None:
    with pytest.raises(ValueError, match=r"The prompts have 2 <\|image\|> but inputs for 1 of them were passed"):
        autoglm_processor(text="<|image|><|image|>", images=screen)
    with pytest.raises(ValueError, match=r"The prompts have 1 <\|audio\|> but inputs for 0"):
        autoglm_processor(text="<|audio|>")
    with pytest.raises(ValueError, match="nothing to process"):
        autoglm_processor()


def test_unknown_roles_and_parts_are_errors(autoglm_processor: AutoGlmProcessor) -> None:
    with pytest.raises(TemplateError, match="unknown role 'tool': use system, user or assistant"):
        autoglm_processor.apply_chat_template([{"role": "tool", "content": "x"}])
    with pytest.raises(TemplateError, match="unknown content part 'video': use text, image or audio"):
        autoglm_processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_causal_and_unseen(autoglm_processor: AutoGlmProcessor, side: str) -> None:
    batch = [[{"role": "user", "content": text}] for text in ("Tap the red circle, Tap", "Tap")]
    data = encode(
        autoglm_processor, batch, return_tensors="pt", processor_kwargs={"padding": True, "padding_side": side}
    )
    padded = data["input_ids"] == SPECIAL_TOKENS.index("<|pad|>")
    assert padded[1].any()
    assert torch.equal(padded, data["attention_mask"] == 0)
    assert torch.equal(padded, data["block_sequence_ids"] == -1)
    assert bool(padded[1, 0 if side == "left" else -1])


def test_assistant_tokens_are_marked_for_training(autoglm_processor: AutoGlmProcessor, dialogue: list[Message]) -> None:
    data = encode(autoglm_processor, [dialogue], return_assistant_tokens_mask=True)
    marked = [t for t, kept in zip(data["input_ids"][0], data["assistant_masks"][0], strict=True) if kept]
    assert autoglm_processor.tokenizer.decode(marked) == (
        '<answer>do(action="Tap")</answer><|endoftext|><answer>4079</answer><|endoftext|>'
    )


def test_saved_and_loaded_it_gives_the_same_tensors(
    autoglm_processor: AutoGlmProcessor, dialogue: list[Message], tmp_path: Path
) -> None:
    autoglm_processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is AutoGlmProcessor
    assert type(loaded.image_processor) is ViTImageProcessorPil
    assert type(loaded.feature_extractor) is AutoGlmFeatureExtractor
    assert loaded.chat_template == autoglm_processor.chat_template
    expected = encode(autoglm_processor, dialogue, return_tensors="pt")
    for name, tensor in encode(loaded, dialogue, return_tensors="pt").items():
        assert torch.equal(tensor, expected[name]), name
    wider = AutoGlmProcessor.from_pretrained(tmp_path, image_seq_length=196, audio_lookahead_tokens=3)
    wider.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (again.image_seq_length, again.audio_lookahead_tokens, again.num_audio_tokens(16_000)) == (196, 3, 16)


def test_files_are_read_and_urls_are_not(
    autoglm_processor: AutoGlmProcessor, screen: Image.Image, tone: NDArray[np.float32], tmp_path: Path
) -> None:
    screen.save(tmp_path / "screen.png")
    soundfile.write(tmp_path / "tone.wav", tone, 16_000, subtype="FLOAT")
    prompt = "<|user|><|image|><|audio|>"
    from_files = autoglm_processor(text=prompt, images=str(tmp_path / "screen.png"), audio=tmp_path / "tone.wav")
    from_memory = autoglm_processor(text=prompt, images=screen, audio=tone)
    for name, value in from_memory.items():
        assert np.array_equal(from_files[name], value), name
    with pytest.raises(ValueError, match="is a URL: it is not fetched here"):
        autoglm_processor(text="<|image|>", images="https://example.org/screen.png")


def test_other_rates_are_resampled() -> None:
    seconds = np.arange(44_100) / 44_100
    wave = np.sin(2 * np.pi * 697 * seconds).astype(np.float32)
    heard = resample(wave, 44_100)
    expected = np.sin(2 * np.pi * 697 * np.arange(16_000) / 16_000)
    assert len(heard) == 16_000
    assert np.abs(heard[200:-200] - expected[200:-200]).max() < 1e-2
    above = np.sin(2 * np.pi * 12_000 * seconds).astype(np.float32)
    assert np.abs(resample(above, 44_100)[200:-200]).max() < 1e-2


def test_sounds_are_mono_samples() -> None:
    assert read_audio(np.array([16_384], dtype=np.int16)).tolist() == [0.5]
    with pytest.raises(ValueError, match=r"one-dimensional array of 16 kHz mono samples, got shape \[2, 100\]"):
        read_audio(np.zeros((2, 100)))
