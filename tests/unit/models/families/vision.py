"""Families that see: one encoder before the text, in the ways that transformers has."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedConfig

from tests.unit.models.families.family import Family
from tests.unit.models.families.rendering import BEGIN, END, IMAGE, ROW, VIDEO, noise
from tests.unit.models.families.text import TEXT, without

CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
SEPARATE = ("vision", "projector", "text", "head")


def image_tokens(count: int) -> list[int]:
    return [BEGIN, *[IMAGE] * count, END]


def pixels(count: int, *shape: int) -> Any:
    """An image as pixels ``[1, *shape]``, in the place of ``count`` tokens."""
    return lambda image: (image_tokens(count), {"pixel_values": noise(image, 1, *shape)})


def llava() -> PreTrainedConfig:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP, projection_dim=32),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )


def llava_next() -> PreTrainedConfig:
    return tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP, projection_dim=32),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[56, 112], [112, 56]],
    )


def llava_next_image(image: Any) -> tuple[list[int], dict[str, Tensor]]:
    # Two tiles of 4 x 4 patches side by side, a newline after each row, and the whole: 4 * (8 + 1) + 16.
    return image_tokens(52), {"pixel_values": noise(image, 1, 3, 3, 56, 56), "image_sizes": torch.tensor([[56, 112]])}


def llava_onevision() -> PreTrainedConfig:
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**CLIP),
        text_config=tf.Qwen2Config(**without("head_dim")),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[56, 56], [56, 112]],
    )


def gemma3() -> PreTrainedConfig:
    return tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(
            **TEXT, sliding_window=16, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"]
        ),
        vision_config=tf.SiglipVisionConfig(**CLIP, vision_use_head=False),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )


def paligemma() -> PreTrainedConfig:
    return tf.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False, "projection_dim": 64},
        text_config={"model_type": "gemma", **TEXT},
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
        vocab_size=200,
    )


def idefics3() -> PreTrainedConfig:
    return tf.Idefics3Config(
        vision_config=CLIP,
        text_config={"model_type": "llama", **TEXT},
        scale_factor=2,
        image_token_id=IMAGE,
    )


def smolvlm() -> PreTrainedConfig:
    return tf.SmolVLMConfig(
        vision_config=CLIP,
        text_config={"model_type": "llama", **TEXT},
        scale_factor=2,
        image_token_id=IMAGE,
    )


def split_image(image: Any) -> tuple[list[int], dict[str, Tensor]]:
    """Two tiles and the whole, a marker before each."""
    tokens = [BEGIN, *[IMAGE] * 4, ROW, *[IMAGE] * 4, END, *[IMAGE] * 4, END]
    return tokens, {"pixel_values": noise(image, 1, 3, 3, 56, 56), "pixel_attention_mask": torch.ones(1, 3, 56, 56)}


def internvl() -> PreTrainedConfig:
    return tf.InternVLConfig(
        vision_config={**CLIP, "image_size": [56, 56], "patch_size": [14, 14], "use_mean_pooling": False},
        text_config={"model_type": "qwen2", **without("head_dim")},
        image_token_id=IMAGE,
        image_seq_length=4,
    )


def tiles(image: Any) -> tuple[list[int], dict[str, Tensor]]:
    return image_tokens(12), {"pixel_values": noise(image, 3, 3, 56, 56)}


def mistral3() -> PreTrainedConfig:
    return tf.Mistral3Config(
        vision_config={"model_type": "pixtral", **CLIP, "head_dim": 16},
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def rows(image: Any) -> tuple[list[int], dict[str, Tensor]]:
    """Pixtral's form: a marker ends each of the image's rows."""
    tokens = [IMAGE, IMAGE, ROW, IMAGE, IMAGE, END]
    return tokens, {"pixel_values": noise(image, 1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}


def aya_vision() -> PreTrainedConfig:
    return tf.AyaVisionConfig(
        vision_config={"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False},
        text_config={"model_type": "cohere2", **TEXT, "sliding_window": 16},
        image_token_index=IMAGE,
    )


def cohere2_vision() -> PreTrainedConfig:
    return tf.Cohere2VisionConfig(
        vision_config={"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False},
        text_config={"model_type": "cohere2", **TEXT, "sliding_window": 16},
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )


def llama4() -> PreTrainedConfig:
    return tf.Llama4Config(
        vision_config={
            **CLIP,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "intermediate_size": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        text_config={
            **TEXT,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "attention_chunk_size": 32,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )


def lfm2_vl() -> PreTrainedConfig:
    return tf.Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model",
            **CLIP,
            "patch_size": 14,
            "num_patches": 16,
            "vision_use_head": False,
        },
        text_config={"model_type": "lfm2", **without("head_dim"), "layer_types": ["conv", "full_attention"]},
        image_token_id=IMAGE,
        projector_hidden_size=64,
    )


def lfm2_image(image: Any) -> tuple[list[int], dict[str, Tensor]]:
    return image_tokens(4), {
        "pixel_values": noise(image, 1, 16, 3 * 14 * 14),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }


def mllama() -> PreTrainedConfig:
    return tf.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 64,
            "image_size": 56,
            "patch_size": 14,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config={
            **without("head_dim"),
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        image_token_index=IMAGE,
    )


def got_ocr2() -> PreTrainedConfig:
    return tf.GotOcr2Config(
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 256,
            "patch_size": 16,
            "mlp_dim": 48,
            "window_size": 4,
            "global_attn_indexes": [1],
        },
        text_config={"model_type": "qwen2", **without("head_dim")},
        image_token_id=IMAGE,
    )


FAMILIES = (
    Family("LLaVA", llava, SEPARATE, {"image": pixels(16, 3, 56, 56)}),
    Family("LLaVA-NeXT", llava_next, SEPARATE, {"image": llava_next_image}),
    Family(
        "LLaVA-OneVision",
        llava_onevision,
        SEPARATE,
        {
            "image": lambda image: (
                image_tokens(52),
                {"pixel_values": noise(image, 1, 3, 3, 56, 56), "image_sizes": torch.tensor([[56, 112]])},
            )
        },
    ),
    Family(
        "Gemma 3",
        gemma3,
        ("vision", "projector", "text"),
        {"image": pixels(16, 3, 56, 56)},
        lambda ids: {"token_type_ids": (ids == IMAGE).int()},
    ),
    Family(
        "PaliGemma",
        paligemma,
        ("vision", "projector", "text"),
        {"image": pixels(16, 3, 56, 56)},
        lambda ids: {"token_type_ids": torch.zeros_like(ids)},
    ),
    Family("Idefics3", idefics3, SEPARATE, {"image": split_image}),
    Family("SmolVLM", smolvlm, SEPARATE, {"image": split_image}),
    Family("InternVL", internvl, ("vision", "projector", "text"), {"image": tiles}),
    Family("Mistral 3 (Pixtral)", mistral3, ("vision", "projector", "text"), {"image": rows}),
    Family("Aya Vision", aya_vision, ("vision", "projector", "text"), {"image": pixels(4, 3, 56, 56)}),
    Family("Command A Vision", cohere2_vision, ("vision", "projector", "text"), {"image": pixels(4, 3, 56, 56)}),
    Family("Llama 4", llama4, ("vision", "projector", "text"), {"image": pixels(4, 3, 56, 56)}),
    Family("LFM2-VL", lfm2_vl, ("vision", "projector", "text"), {"image": lfm2_image}),
    Family("GOT-OCR2", got_ocr2, ("vision", "projector", "text"), {"image": pixels(16, 3, 256, 256)}),
    Family("Llama 3.2 Vision, text alone", mllama, ("vision", "projector", "text", "head")),
)
