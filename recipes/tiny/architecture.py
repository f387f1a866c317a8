"""The sizes of autoglm-tiny: 5.93 M parameters, under 12 MB in bfloat16."""

from __future__ import annotations

from autoglm_lab.models.autoglm import AutoGlmConfig
from recipes.tiny.tokenizer import VOCAB_SIZE


def tiny_config() -> AutoGlmConfig:
    """Vision 4 x 128, audio 3 x 128, text 6 x 256 with 8 heads on 2 key-value heads."""
    return AutoGlmConfig(
        vision_merge=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
        vision_config={"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
        audio_config={
            "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256,
            "subsampling_conv_channels": 32, "default_num_lookahead_tokens": 1, "dropout": 0, "layerdrop": 0,
            "activation_dropout": 0, "attention_dropout": 0,
        },
        text_config={
            "vocab_size": VOCAB_SIZE, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 512, "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
        },
    )  # fmt: skip
