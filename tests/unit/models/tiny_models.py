"""Small real transformers models of many shapes, by name: what the memory tests run on."""

from __future__ import annotations

from collections.abc import Callable

import transformers as tf
from transformers import PreTrainedConfig

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def llava(**text: object) -> PreTrainedConfig:
    """Vision, projector, text and an untied head; its checkpoint has other names than its modules."""
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=64),
        text_config=tf.LlamaConfig(**{**TEXT, **text}),
        image_token_index=199,
    )


def gemma3() -> PreTrainedConfig:
    """Tied head, scaled embeddings, two sets of rotary frequencies."""
    return tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=16),
        vision_config=tf.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=199,
        boi_token_index=197,
        eoi_token_index=198,
    )


def glm4v() -> PreTrainedConfig:
    """The public phone agent's architecture: the merger is a part of the vision tower."""
    return tf.Glm4vConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "patch_size": 14,
            "intermediate_size": 128,
            "out_hidden_size": 64,
        },
    )


def qwen2_audio() -> PreTrainedConfig:
    return tf.Qwen2AudioConfig(
        audio_config={
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "num_mel_bins": 16,
            "max_source_positions": 50,
        },
        text_config={"model_type": "qwen2", **TEXT},
    )


def idefics3() -> PreTrainedConfig:
    return tf.Idefics3Config(
        vision_config=VISION,
        text_config={"model_type": "llama", **TEXT},
        tie_word_embeddings=False,
        scale_factor=2,
    )


def omni() -> PreTrainedConfig:
    """Three modalities: sound, images and text."""
    return tf.Qwen2_5OmniThinkerConfig(
        audio_config={
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "num_mel_bins": 16,
            "output_dim": 64,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 128,
            "out_hidden_size": 64,
        },
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
    )


def whisper() -> PreTrainedConfig:
    return tf.WhisperConfig(
        vocab_size=200,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        pad_token_id=0,
        num_mel_bins=16,
        max_source_positions=50,
        architectures=["WhisperForConditionalGeneration"],
    )


def llama(**settings: object) -> PreTrainedConfig:
    return tf.LlamaConfig(**{**TEXT, **settings})


def autoglm() -> PreTrainedConfig:
    from autoglm_lab.models import catalog

    return catalog.preset("autoglm-tiny").config()


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    family.__name__: family for family in (autoglm, llava, gemma3, glm4v, qwen2_audio, idefics3, omni, whisper, llama)
}
