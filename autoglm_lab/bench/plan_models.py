"""The models that plans are held to: two presets, and two public families by their configurations.

The families' sizes are those of the config.json that their makers publish (Qwen/Qwen2.5-VL-3B-Instruct,
google/gemma-3-4b-it); weights are made up, and so is the processor: a text takes one token a byte, an image as many as
the family's own processor gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

PRESETS = ("autoglm-tiny", "autoglm-article", "autoglm-phone-9b")


def source(name: str, *, small: bool = False) -> str | PreTrainedConfig:
    """What `load` takes: a preset's name, or a configuration.

    Args:
        name: one of `PRESETS` or `FAMILIES`.
        small: a few narrow layers instead of the true sizes.
    """
    return name if name in PRESETS else FAMILIES[name](small)


def made_up_processor(config: PreTrainedConfig) -> Any:
    """A processor for a family's configuration."""
    return ByteProcessor(config)


def qwen25_vl_3b(small: bool = False) -> PreTrainedConfig:
    """Qwen2.5-VL, 3B: a windowed vision tower, positions of three planes, a head tied to the embeddings."""
    from transformers import Qwen2_5_VLConfig

    text: dict[str, Any] = {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
    }
    vision: dict[str, Any] = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    if small:
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        text |= {**narrow, "vocab_size": 512, "bos_token_id": None, "eos_token_id": None}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
        vision |= {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64}
        vision["fullatt_block_indexes"] = [1]
    ids: dict[str, Any] = {
        "image_token_id": 300,
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="bfloat16", **ids)
    config.tie_word_embeddings = True
    return config


def gemma3_4b(small: bool = False) -> PreTrainedConfig:
    """Gemma 3, 4B: five of six layers see a window, so that its cache is transformers' own."""
    from transformers import Gemma3Config

    text: dict[str, Any] = {
        "vocab_size": 262_208,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131_072,
    }
    vision: dict[str, Any] = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    tokens = 256
    if small:
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
        text |= {**narrow, "vocab_size": 512, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 64}
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision["image_size"], tokens = 56, 4
    ids: dict[str, Any] = {"image_token_index": 300, "boi_token_index": 302, "eoi_token_index": 303}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=tokens, dtype="bfloat16", **ids)


FAMILIES: dict[str, Callable[[bool], PreTrainedConfig]] = {
    "qwen2.5-vl-3b": qwen25_vl_3b,
    "gemma-3-4b": gemma3_4b,
}
"""Configurations by name."""


class ByteTokenizer:
    """One token a byte; every other id stands for nothing that people see."""

    unk_token_id = None
    eos_token_id = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(one for one in map(int, ids) if 32 <= one < 127).decode()

    def convert_tokens_to_ids(self, token: str) -> None:
        """No marker is a token here."""
        del token


class ByteProcessor:
    """Renders a dialogue for a model that has no processor here: bytes, and runs of the family's image token."""

    chat_template = ""

    def __init__(self, config: Any) -> None:
        self.tokenizer = ByteTokenizer()
        self._config = config
        token = getattr(config, "image_token_id", None)
        self._image_token = int(config.image_token_index if token is None else token)
        vision = config.vision_config
        if hasattr(config, "mm_tokens_per_image"):
            from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

            size = {"height": vision.image_size, "width": vision.image_size}
            self.image_processor: Any = Gemma3ImageProcessorPil(size=size)
        else:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            self.image_processor = Qwen2VLImageProcessorPil(
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
            )

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **_: Any) -> dict[str, Any]:
        """The prompt's ids ``[1, seq]``, and the tensors of its images."""
        contents = [message["content"] for message in messages]
        pictures = [
            part["image"]
            for content in contents
            if not isinstance(content, str)
            for part in content
            if part["type"] == "image"
        ]
        given = dict(self.image_processor(images=pictures, return_tensors="pt")) if pictures else {}
        counts = iter(self._counts(given))
        ids: list[int] = []
        for content in contents:
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "image":
                    ids += [302, *[self._image_token] * next(counts), 303]
                else:
                    ids += part["text"].encode()
            ids.append(10)
        row = torch.tensor([ids])
        kinds = (row == self._image_token).long()
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        tensors.pop("num_crops", None)
        return {"input_ids": row, "token_type_ids": kinds, "mm_token_type_ids": kinds, **tensors}

    def _counts(self, given: dict[str, Any]) -> list[int]:
        grids = given.get("image_grid_thw")
        if grids is not None:
            merged = int(self._config.vision_config.spatial_merge_size) ** 2
            return [int(grid.prod()) // merged for grid in grids]
        pixels = given.get("pixel_values")
        return [] if pixels is None else [int(self._config.mm_tokens_per_image)] * len(pixels)
