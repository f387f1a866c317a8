"""Families that hear, and those that see and hear."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedConfig

from tests.unit.models.families.family import Family
from tests.unit.models.families.grids import MROPE, patches
from tests.unit.models.families.rendering import AUDIO, BEGIN, END, IMAGE, VIDEO, noise
from tests.unit.models.families.text import TEXT, without
from tests.unit.models.families.vision import CLIP, image_tokens

WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "max_source_positions": 50,
}


def heard(count: int, *shape: int, mask: str = "", length: int = 0) -> Any:
    """A sound as features ``[1, *shape]`` in the place of ``count`` tokens; its mask, if it has a name, is all ones."""

    def take(samples: Any) -> tuple[list[int], dict[str, Tensor]]:
        given = {"input_features": noise(samples, 1, *shape)}
        if mask:
            given[mask] = torch.ones(1, length, dtype=torch.long)
        return [BEGIN, *[AUDIO] * count, END], given

    return take


def qwen2_audio() -> PreTrainedConfig:
    return tf.Qwen2AudioConfig(
        audio_config=WHISPER,
        text_config={"model_type": "qwen2", **without("head_dim")},
        audio_token_index=AUDIO,
    )


def voxtral() -> PreTrainedConfig:
    audio = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 16,
        "max_source_positions": 40,
        "vocab_size": 200,
    }
    return tf.VoxtralConfig(audio_config=audio, text_config={"model_type": "llama", **TEXT}, audio_token_id=AUDIO)


def audioflamingo() -> PreTrainedConfig:
    audio = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 16,
        "max_source_positions": 40,
    }
    return tf.AudioFlamingo3Config(
        audio_config=audio, text_config={"model_type": "qwen2", **without("head_dim")}, audio_token_id=AUDIO
    )


def granite_speech() -> PreTrainedConfig:
    return tf.GraniteSpeechConfig(
        encoder_config={
            "input_dim": 16,
            "num_layers": 2,
            "hidden_dim": 32,
            "num_heads": 2,
            "dim_head": 16,
            "output_dim": 8,
            "context_size": 20,
            "max_pos_emb": 32,
            "feedforward_mult": 2,
        },
        projector_config={
            "model_type": "blip_2_qformer",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 1,
        },
        text_config={"model_type": "granite", **without("head_dim")},
        audio_token_index=AUDIO,
        has_lora_adapter=False,
    )


def omni() -> PreTrainedConfig:
    return tf.Qwen2_5OmniThinkerConfig(
        audio_config={**WHISPER, "output_dim": 64, "n_window": 10, "max_source_positions": 100},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        text_config={**without("head_dim"), "rope_parameters": MROPE},
        image_token_index=IMAGE,
        audio_token_index=AUDIO,
        video_token_index=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        audio_start_token_id=186,
        audio_end_token_id=187,
    )


def omni_sound(samples: Any) -> tuple[list[int], dict[str, Tensor]]:
    return [186, *[AUDIO] * 10, 187], {
        "input_features": noise(samples, 1, 16, 60),
        "feature_attention_mask": (torch.arange(60) < 40).long()[None],
    }


def qwen3_omni() -> PreTrainedConfig:
    return tf.Qwen3OmniMoeThinkerConfig(
        audio_config={**WHISPER, "output_dim": 64, "n_window_infer": 100, "downsample_hidden_size": 16},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            **without("head_dim"),
            "head_dim": 16,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        audio_start_token_id=186,
        audio_end_token_id=187,
    )


def qwen3_omni_sound(samples: Any) -> tuple[list[int], dict[str, Tensor]]:
    return [186, *[AUDIO] * 13, 187], {
        "input_features": noise(samples, 1, 16, 130),
        "feature_attention_mask": (torch.arange(130) < 100).long()[None],
    }


def gemma4(**text: Any) -> PreTrainedConfig:
    return tf.Gemma4Config(
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 200,
            "use_bidirectional_attention": "vision",
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            **text,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        audio_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [128, 4],
            "output_proj_dims": 32,
            "use_clipped_linears": False,
        },
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        video_token_id=VIDEO,
        boi_token_id=BEGIN,
        eoi_token_id=END,
        boa_token_id=186,
        eoa_token_index=187,
    )


def gemma4_image(image: Any) -> tuple[list[int], dict[str, Tensor]]:
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
    positions = torch.cat([grid, torch.full((4, 2), -1)])[None]
    return image_tokens(4), {"pixel_values": noise(image, 1, 20, 48), "image_position_ids": positions}


def gemma4_sound(samples: Any) -> tuple[list[int], dict[str, Tensor]]:
    given = {"input_features": noise(samples, 1, 32, 128), "input_features_mask": torch.ones(1, 32, dtype=torch.bool)}
    return [186, *[AUDIO] * 8, 187], given


def gemma4_kinds(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int() + 3 * (ids == AUDIO).int()}


def phi4() -> PreTrainedConfig:
    return tf.Phi4MultimodalConfig(
        **without("head_dim"),
        vision_config={**CLIP, "crop_size": 56, "image_token_id": IMAGE},
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "input_size": 16,
            "nemo_conv_channels": 16,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "audio_token_id": AUDIO,
            "time_reduction": 4,
        },
        sliding_window=None,
        original_max_position_embeddings=512,
    )


def phi4_image(image: Any) -> tuple[list[int], dict[str, Tensor]]:
    # One crop of 2 x 2 features and the whole, a separator after each row and one between them: 2 * (4 + 2) + 1.
    return [IMAGE] * 13, {
        "image_pixel_values": noise(image, 1, 2, 3, 56, 56),
        "image_sizes": torch.tensor([[56, 56]]),
        "image_attention_mask": torch.ones(1, 2, 4, 4),
    }


def phi4_sound(samples: Any) -> tuple[list[int], dict[str, Tensor]]:
    return [AUDIO] * 6, {
        "audio_input_features": noise(samples, 1, 24, 16),
        "audio_embed_sizes": torch.tensor([6]),
    }


BOTH = ("vision", "audio", "text", "head")
FAMILIES = (
    Family(
        "Qwen2-Audio",
        qwen2_audio,
        ("audio", "projector", "text", "head"),
        {"audio": heard(25, 16, 100, mask="feature_attention_mask", length=100)},
    ),
    Family("Voxtral", voxtral, ("audio", "projector", "text", "head"), {"audio": heard(10, 16, 80)}),
    Family(
        "Audio Flamingo 3",
        audioflamingo,
        ("audio", "projector", "text", "head"),
        {"audio": heard(20, 16, 80, mask="input_features_mask", length=80)},
    ),
    Family("Granite Speech", granite_speech, ("audio", "projector", "text"), {"audio": heard(6, 30, 16)}),
    Family("Qwen2.5-Omni (thinker)", omni, BOTH, {"image": patches(1176, 4, 6), "audio": omni_sound}),
    Family("Qwen3-Omni (thinker)", qwen3_omni, BOTH, {"image": patches(1536, 4, 6), "audio": qwen3_omni_sound}),
    Family(
        "Gemma 4",
        gemma4,
        ("vision", "audio", "projector", "text"),
        {"image": gemma4_image, "audio": gemma4_sound},
        gemma4_kinds,
    ),
    Family(
        "Gemma 4, causal",
        lambda: gemma4(use_bidirectional_attention=None, num_kv_shared_layers=0),
        ("vision", "audio", "projector", "text"),
        {"image": gemma4_image, "audio": gemma4_sound},
        gemma4_kinds,
    ),
    Family(
        "Phi-4-multimodal",
        phi4,
        ("vision", "audio", "projector", "text", "head"),
        {"image": phi4_image, "audio": phi4_sound},
    ),
)
