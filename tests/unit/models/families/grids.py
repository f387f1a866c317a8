"""Families that see images as grids of patches, whose tokens have rows and columns for positions."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedConfig

from tests.unit.models.families.family import Family
from tests.unit.models.families.rendering import BEGIN, END, IMAGE, VIDEO, noise
from tests.unit.models.families.text import TEXT, without
from tests.unit.models.families.vision import image_tokens

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def patches(size: int, rows: int, columns: int, *, merge: int = 2) -> Any:
    """An image as a row of patches with its grid, as the Qwen-VL and GLM-V families take it."""

    def take(image: Any) -> tuple[list[int], dict[str, Tensor]]:
        count = rows * columns // merge**2
        grid = torch.tensor([[1, rows, columns]])
        return image_tokens(count), {"pixel_values": noise(image, rows * columns, size), "image_grid_thw": grid}

    return take


def kinds(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int()}


def glm4v() -> PreTrainedConfig:
    return tf.Glm4vConfig(
        text_config={
            **without("head_dim"),
            "rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 14,
            "intermediate_size": 48,
            "out_hidden_size": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=BEGIN,
        image_end_token_id=END,
        video_start_token_id=193,
        video_end_token_id=194,
    )


def qwen2_vl() -> PreTrainedConfig:
    return tf.Qwen2VLConfig(
        text_config={**without("head_dim"), "rope_parameters": MROPE},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )


def qwen25_vl() -> PreTrainedConfig:
    return tf.Qwen2_5_VLConfig(
        text_config={**without("head_dim"), "rope_parameters": MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )


def qwen3_vl() -> PreTrainedConfig:
    return tf.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
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
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )


def qwen35() -> PreTrainedConfig:
    return tf.Qwen3_5Config(
        text_config={
            **TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {
                **MROPE,
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )


FAMILIES = (
    Family(
        "GLM-4.1V / AutoGLM-Phone (Glm4v)", glm4v, ("vision", "text", "head"), {"image": patches(1176, 4, 6)}, kinds
    ),
    Family("Qwen2-VL", qwen2_vl, ("vision", "text", "head"), {"image": patches(1176, 4, 6)}, kinds),
    Family("Qwen2.5-VL", qwen25_vl, ("vision", "text", "head"), {"image": patches(1176, 4, 6)}, kinds),
    Family("Qwen3-VL", qwen3_vl, ("vision", "text", "head"), {"image": patches(1536, 4, 6)}, kinds),
    Family("Qwen3.5", qwen35, ("vision", "text", "head"), {"image": patches(1536, 4, 6)}, kinds),
)
