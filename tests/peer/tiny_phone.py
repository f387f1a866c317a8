"""A small model of the phone agent's family with random weights, as a folder that vLLM serves.

It answers an image with noise: what is looked at is whether the image goes through.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from autoglm_lab.models.phone_processor import phone_processor

# Behind the 256 bytes and the markers that the tokenizer numbers itself.
_MARKERS = (
    "image_start_token_id",
    "image_end_token_id",
    "video_start_token_id",
    "video_end_token_id",
    "image_token_id",
    "video_token_id",
)
_CONTEXT = 4096


def write_tiny_phone(folder: Path) -> None:
    """Write weights, tokenizer, template, and what the images are prepared with."""
    config = Glm4vConfig(
        text_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": _CONTEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "num_heads": 4,
            "intermediate_size": 256,
            "out_hidden_size": 128,
        },
        **{name: 300 + index for index, name in enumerate(_MARKERS)},
    )
    torch.manual_seed(0)
    model = Glm4vForConditionalGeneration(config)
    processor = phone_processor(config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template)
    # Named as in the public repository, where the video part has the same settings in a file of its own.
    images = folder / "preprocessor_config.json"
    settings = json.loads(images.read_text())
    settings |= {"image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor"}
    images.write_text(json.dumps(settings, indent=1))
    videos = settings | {"video_processor_type": "Glm4vVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos, indent=1))
