"""What `generate` needs to know of AutoGLM: blocks of the prompt, and sounds encoded once for all beams.

The library annotates its mixin for a protocol of its own, which no class outside it satisfies.
"""
# mypy: disable-error-code="arg-type, assignment, attr-defined, misc, no-any-return, override, return-value"

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .prompt_mask import prompt_mask


class AutoGlmGenerationMixin(GenerationMixin):
    """GenerationMixin with `block_sequence_ids`, and with sounds where the library's has images."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        block_sequence_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As the library's, and the blocks of the prompt: generated tokens are causal.

        A compilable cache makes the library build the mask here, before the forward sees the blocks: so it is built
        with them first. Where the cache holds the beginning of the prompt, so are the features that it already took.

        Raises:
            ValueError: A chunked prefill would cut a bidirectional block in two.
        """
        if not is_first_iteration and kwargs.get("use_cache", True):
            # After the prefill every query is a generated token.
            block_sequence_ids = None
        if (
            block_sequence_ids is not None
            and getattr(past_key_values, "is_compileable", False)
            and (attention_mask is None or attention_mask.ndim == 2)
        ):
            prompt = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
            length = prompt.shape[1] if next_sequence_length is None else next_sequence_length
            attention_mask = prompt_mask(
                self.config,
                torch.empty((prompt.shape[0], length, 0), dtype=self.dtype, device=prompt.device),
                attention_mask,
                past_key_values,
                kwargs.get("position_ids"),
                block_sequence_ids,
            )
        if block_sequence_ids is not None:
            self._refuse_split_blocks(
                block_sequence_ids, input_ids, inputs_embeds, next_sequence_length, past_key_values
            )
        if is_first_iteration and inputs_embeds is None and next_sequence_length is not None:
            kwargs["mm_encoder_outputs"] = self._features_not_cached(
                input_ids, next_sequence_length, kwargs.get("mm_encoder_outputs") or {}
            )
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if block_sequence_ids is not None:
            model_inputs["block_sequence_ids"] = block_sequence_ids
        return model_inputs

    def _refuse_split_blocks(
        self,
        block_sequence_ids: torch.Tensor,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        next_sequence_length: int | None,
        past_key_values: Cache | None,
    ) -> None:
        given = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
        seen = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        end = seen + (given if next_sequence_length is None else next_sequence_length)
        if 0 < end < block_sequence_ids.shape[1]:
            before, after = block_sequence_ids[:, end - 1], block_sequence_ids[:, end]
            if bool(((before == after) & (before >= 0)).any()):
                raise ValueError(
                    f"the prefill stops at token {end}, inside a bidirectional block, which must be prefilled in one "
                    "piece: raise prefill_chunk_size, or set config.bidirectional_prompt=False"
                )

    def _features_not_cached(self, input_ids: torch.Tensor, new: int, encoded: dict[str, Any]) -> dict[str, Any]:
        """The features whose placeholders are among the last `new` tokens of the prompts."""
        kept = {}
        for modality, output in encoded.items():
            places = input_ids == getattr(self.config, f"{modality}_token_id")
            counts, remaining = places.sum(-1).tolist(), places[:, input_ids.shape[1] - new :].sum(-1).tolist()
            if counts == remaining:
                kept[modality] = output
            elif any(remaining):
                rows = output.pooler_output.reshape(-1, output.pooler_output.shape[-1]).split(counts)
                last = [row[len(row) - n :] for row, n in zip(rows, remaining, strict=True)]
                kept[modality] = BaseModelOutputWithPooling(pooler_output=torch.cat(last))
        return kept

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Encode images (the library) and sounds before the prefill."""
        model_kwargs["mm_encoder_outputs"] = dict(model_kwargs.get("mm_encoder_outputs") or {})
        model_kwargs = super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        input_features = model_kwargs.pop("input_features", None)
        input_features_mask = model_kwargs.pop("input_features_mask", None)
        if input_features is not None:
            if model_kwargs["mm_encoder_outputs"].get("audio") is not None:
                raise ValueError("pass input_features or mm_encoder_outputs['audio'], not both")
            model_kwargs["mm_encoder_outputs"]["audio"] = self.base_model.get_audio_features(
                input_features, input_features_mask, return_dict=True
            )
        return model_kwargs

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.Tensor | None,
        mm_encoder_output: dict[str, BaseModelOutputWithPooling],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Repeat the features of each prompt for its beams: [A, B] of two prompts -> [A, A, B, B]."""
        expanded = dict(super()._expand_multimodal_outputs(input_ids, mm_encoder_output, expand_size, inputs_embeds))
        if (heard := expanded.get("audio")) is not None:
            if input_ids is None or input_ids.numel() == 0:
                token = self.get_input_embeddings()(torch.tensor(self.config.audio_token_id, device=self.device))
                counts = (inputs_embeds == token).all(-1).sum(-1)
            else:
                counts = (input_ids == self.config.audio_token_id).sum(-1)
            features = heard.pooler_output.reshape(-1, heard.pooler_output.shape[-1])
            rows = features.split(counts.tolist())
            expanded["audio"] = BaseModelOutputWithPooling(
                pooler_output=torch.cat([row for row in rows for _ in range(expand_size)])
            )
        return expanded
