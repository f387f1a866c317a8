"""GLM's attention over the prompt: bidirectional within a user turn, causal elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .configuration_autoglm import AutoGlmConfig


def prompt_mask(
    config: AutoGlmConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    block_sequence_ids: torch.Tensor | None,
) -> torch.Tensor | None:
    """The decoder's mask: GLM's bidirectional blocks over a causal mask, or what was given if there are no blocks.

    Raises:
        ValueError: The decoder's attention is flash attention, which would drop the blocks without a word.
    """
    if block_sequence_ids is None or not config.bidirectional_prompt:
        return attention_mask
    text_config = config.get_text_config()
    if (text_config._attn_implementation or "").startswith("flash_attention"):
        raise ValueError(
            f"{text_config._attn_implementation} cannot attend bidirectionally within a user turn: use sdpa or eager, "
            "or set config.bidirectional_prompt=False"
        )
    mask: Any = create_causal_mask(
        config=text_config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        block_sequence_ids=block_sequence_ids.to(inputs_embeds.device),
    )
    # A block mask only comes from flex attention, which the model does not support.
    return mask  # type: ignore[no-any-return]
