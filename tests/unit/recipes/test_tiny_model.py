"""The embedded model and its recipe agree: same tokens, same log-mels, and the shipped weights answer."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoProcessor

from autoglm_lab.models.autoglm import AutoGlmForConditionalGeneration
from autoglm_lab.samples import SAMPLES, Sample
from recipes.tiny import conversations
from recipes.tiny.encode import CHUNKS, GROUPS, encode, messages, write_sample
from recipes.tiny.evaluate import WEIGHTS, answers
from recipes.tiny.losses import LogMel, Losses, slim_norms
from recipes.tiny.ship import LIMIT
from recipes.tiny.stream import fill
from recipes.tiny.train import load_weights


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def model() -> AutoGlmForConditionalGeneration:
    torch.set_num_threads(1)
    return AutoGlmForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", conversations.TRAINED)
def test_training_ids_equal_those_of_the_shipped_processor(name: str, processor: Any) -> None:
    rng = random.Random(3)
    for _ in range(4):
        dialogue = conversations.TRAINED[name](rng, "train")
        ids, _, blocks = encode(dialogue, processor.tokenizer)
        prompt = processor.apply_chat_template(
            messages(dialogue), add_generation_prompt=True, enable_thinking=dialogue.thinking, tokenize=True,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip
        last = dialogue.turns[-1]
        answer = processor.encode_answer(last.answer, last.thought if dialogue.thinking else None)
        length = prompt["input_ids"].shape[1]
        assert prompt["input_ids"][0].tolist() + answer == ids
        assert prompt["block_sequence_ids"][0].tolist() == blocks[:length]


def test_the_training_front_end_equals_the_shipped_one(processor: Any) -> None:
    rng = np.random.default_rng(0)
    for samples in (900, 1481, 16_000, 31_337):
        clip = rng.integers(-9000, 9000, samples).astype(np.int16)
        wanted = processor.log_mels([(clip / 32767).astype(np.float32)])["input_features"]
        padded = torch.zeros(1, CHUNKS.frames(30) * 160, dtype=torch.int16)
        padded[0, :samples] = torch.from_numpy(clip)
        mels, mask = LogMel(processor.feature_extractor)(padded, torch.tensor([samples]))
        assert int(mask.sum()) == wanted.shape[1]
        torch.testing.assert_close(mels[:, : wanted.shape[1]], wanted, atol=2e-3, rtol=0)


def test_a_training_chunk_is_deterministic_by_its_seed(processor: Any) -> None:
    group = next(group for group in GROUPS if group.name == "both")
    made = []
    for seed in (1, 1, 2):
        out: dict[str, Any] = {k: np.zeros((64, *shape), kind) for k, (shape, kind) in group.fields().items()}
        fill(out, group, seed, processor.tokenizer)
        made.append(out)
    assert all(np.array_equal(made[0][key], made[1][key]) for key in made[0])
    assert not np.array_equal(made[0]["ids"], made[2]["ids"])


def test_training_loss_equals_the_models_own(model: AutoGlmForConditionalGeneration, processor: Any) -> None:
    group = next(group for group in GROUPS if group.name == "both")
    dialogue = conversations.trimodal(random.Random(9), "train")
    out: dict[str, Any] = {k: np.zeros((1, *shape), kind) for k, (shape, kind) in group.fields().items()}
    assert write_sample(out, 0, group, dialogue, processor.tokenizer)
    batch = {name: torch.from_numpy(values) for name, values in out.items()}
    batch["mels"], batch["mel_mask"] = LogMel(processor.feature_extractor)(batch.pop("pcm"), batch.pop("samples"))
    ids, labels, blocks = encode(dialogue, processor.tokenizer)
    inputs = processor.apply_chat_template(messages(dialogue), tokenize=True, return_dict=True, return_tensors="pt")
    media = {key: inputs[key] for key in ("pixel_values", "input_features", "input_features_mask")}
    trained = AutoGlmForConditionalGeneration(model.config).float()
    trained.load_state_dict(model.state_dict())
    slim_norms(trained)
    with torch.no_grad():
        loss, _ = Losses(trained)(batch)
        wanted = model(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            block_sequence_ids=torch.tensor([blocks]), labels=torch.tensor([labels]), **media,
        ).loss  # fmt: skip
    torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=1e-3)


def test_training_resumes_from_the_shipped_folder(model: AutoGlmForConditionalGeneration) -> None:
    resumed = AutoGlmForConditionalGeneration(model.config).float()
    load_weights(resumed, WEIGHTS)
    for name, wanted in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], wanted), name


def test_the_shipped_weights_fit_the_package() -> None:
    assert (WEIGHTS / "model.safetensors").stat().st_size <= LIMIT


@pytest.mark.parametrize(("task", "least"), [("identity", 12), ("dtmf", 12), ("trimodal", 11), ("tap", 10)])
def test_the_shipped_weights_answer_held_out_questions(
    task: str, least: int, model: AutoGlmForConditionalGeneration, processor: Any
) -> None:
    rng = random.Random(f"test {task}")
    dialogues = [conversations.EVALUATED[task](rng, "held") for _ in range(12)]
    assert sum(outcome.correct for outcome in answers(model, processor, dialogues, 6)) >= least


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_the_model_answers_the_sample(sample: Sample, model: AutoGlmForConditionalGeneration, processor: Any) -> None:
    content: list[dict[str, Any]] = []
    if sample.image is not None:
        content.append({"type": "image", "image": Image.open(sample.image)})
    if sample.audio is not None:
        content.append({"type": "audio", "audio": soundfile.read(sample.audio, dtype="float32")[0]})
    content.append({"type": "text", "text": sample.prompt["en"]})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    made = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    _, answer = processor.split_answer(processor.tokenizer.decode(made, skip_special_tokens=True))
    if sample.area is None:
        assert answer == sample.answer
        return
    x, y = (int(number) for number in answer.split("[")[1].rstrip("])").split(","))
    assert sample.area[0] <= x <= sample.area[2] and sample.area[1] <= y <= sample.area[3]
