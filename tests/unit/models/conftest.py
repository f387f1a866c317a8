"""A small tri-modal model with random weights, and its processor with a tokenizer trained on the spot."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import NemotronAsrStreamingFeatureExtractor, PreTrainedTokenizerFast, ViTImageProcessorPil

from autoglm_lab.models.autoglm import (
    AutoGlmConfig,
    AutoGlmForConditionalGeneration,
    AutoGlmProcessor,
    special_tokens,
)

TEXTS = ["Tap the red circle", "What is the code?", "验证码是多少?", 'do(action="Tap", element=[500,120])'] * 20


@pytest.fixture(scope="session")
def autoglm_processor() -> AutoGlmProcessor:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special_tokens(), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    # The trainer marks all of them special; the answer's tags must survive decoding.
    plain = json.loads(bpe.to_str())
    for entry, token in zip(plain["added_tokens"], special_tokens(), strict=True):
        entry["special"] = token.special
    bpe = Tokenizer.from_str(json.dumps(plain))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|endoftext|>")
    front_end = NemotronAsrStreamingFeatureExtractor(feature_size=80)
    return AutoGlmProcessor(ViTImageProcessorPil(), front_end, tokenizer)


@pytest.fixture(scope="session")
def autoglm_config() -> AutoGlmConfig:
    return AutoGlmConfig(
        vision_merge=2,
        tie_word_embeddings=True,
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
        audio_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "subsampling_conv_channels": 8,
            "default_num_lookahead_tokens": 1,
        }
        | dict.fromkeys(("dropout", "layerdrop", "activation_dropout", "attention_dropout"), 0.0),
        text_config={
            "vocab_size": 400,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 96,
            "max_position_embeddings": 4096,
        },
    )


@pytest.fixture
def autoglm_model(autoglm_config: AutoGlmConfig) -> AutoGlmForConditionalGeneration:
    """Weights three times as wide as usual, so that what a token attends to shows in the logits and in greedy text."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoGlmForConditionalGeneration(copy.deepcopy(autoglm_config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="session")
def screen() -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def tone() -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(2).standard_normal(16_000)).astype(np.float32)
