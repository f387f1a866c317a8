"""The tri-modal AutoGLM architecture, composed of transformers' ViT, streaming Conformer and GLM decoder.

Annotations are real objects here: transformers reads those of `forward` to learn what a model can return.
"""
# transformers' decorators and bases are untyped.
# mypy: disable-error-code="attr-defined, misc, no-any-return, no-untyped-call, untyped-decorator"

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers import AutoModel, ViTConfig, ViTModel, ViTPreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .audio_tower import AudioStreamState, AutoGlmAudioTower, hear
from .configuration_autoglm import AutoGlmConfig
from .generation_autoglm import AutoGlmGenerationMixin
from .prompt_mask import prompt_mask


@dataclass
class AutoGlmAudioFeatures(BaseModelOutputWithPooling):
    """BaseModelOutputWithPooling with `attention_mask` [n, tokens]: which tokens of each sound are real."""

    attention_mask: torch.Tensor | None = None


@dataclass
class AutoGlmModelOutputWithPast(BaseModelOutputWithPast):
    """Decoder output, and the features of images and sounds as the decoder took them.

    image_hidden_states: [n_images, tokens, text_hidden]; audio_hidden_states: [n_audio_tokens, text_hidden].
    """

    image_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None


@dataclass
class AutoGlmCausalLMOutputWithPast(ModelOutput):
    """Logits [batch, seq, vocab], the loss when labels were given, and what AutoGlmModelOutputWithPast has."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None


class AutoGlmVisionTower(ViTPreTrainedModel):
    """Pixels [n, 3, size, size] -> features [n, tokens, feature_size], one for each square of merge x merge patches."""

    def __init__(self, config: ViTConfig, feature_size: int, merge: int) -> None:
        super().__init__(config)
        self.merge = merge
        self.side = int(config.image_size) // int(config.patch_size)  # type: ignore[arg-type]
        self.encoder = ViTModel._from_config(config, add_pooling_layer=False)
        self.merger = nn.Linear(config.hidden_size * merge**2, feature_size)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`last_hidden_state` is the ViT's [n, 1 + patches, hidden], `pooler_output` the features."""
        outputs = self.encoder(pixel_values, **kwargs)
        patches = outputs.last_hidden_state[:, 1:]
        n, _, width = patches.shape
        rows = self.side // self.merge
        squares = patches.view(n, rows, self.merge, rows, self.merge, width).transpose(2, 3)
        outputs.pooler_output = self.merger(squares.reshape(n, rows * rows, self.merge**2 * width))
        return outputs


class AutoGlmProjector(nn.Module):
    """Features of an encoder [..., in_features] -> what the decoder takes [..., text_hidden]."""

    def __init__(self, config: AutoGlmConfig, in_features: int) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        inner = config.projector_hidden_size or width
        self.linear_1 = nn.Linear(in_features, inner)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(inner, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class AutoGlmPreTrainedModel(PreTrainedModel):
    """What AutoGLM's classes share: weights' initialisation, loading, and what attention they can run."""

    config: AutoGlmConfig
    config_class = AutoGlmConfig
    base_model_prefix = "model"
    input_modalities = ["image", "audio", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["GlmDecoderLayer", "ViTLayer", "AutoGlmAudioBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # Flash attention cannot express the bidirectional blocks, and the Conformer's position bias neither flash nor flex.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False


class AutoGlmModel(AutoGlmPreTrainedModel):
    """Encoders, projectors and decoder without a head."""

    def __init__(self, config: AutoGlmConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoGlmVisionTower._from_config(
            config.vision_config, feature_size=config.vision_feature_size, merge=config.vision_merge
        )
        self.vision_projector = AutoGlmProjector(config, config.vision_feature_size)
        self.audio_tower = AutoGlmAudioTower._from_config(config.audio_config)
        self.audio_projector = AutoGlmProjector(config, config.audio_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Images [n, 3, size, size] as the decoder takes them: `pooler_output` [n, tokens, text_hidden]."""
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.merger.weight.dtype), **kwargs)
        outputs.pooler_output = self.vision_projector(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Log-mels [n, frames, mels] as the decoder takes them: `pooler_output` [n_tokens, text_hidden].

        The tokens of all sounds lie one after another without padding; `attention_mask` [n, tokens] of the result says
        which are real, and `last_hidden_state` is the Conformer's [n, tokens, audio_hidden].
        """
        outputs = self.audio_tower(
            input_features.to(self.audio_projector.linear_1.weight.dtype),
            attention_mask=input_features_mask,
            num_lookahead_tokens=self.config.audio_config.default_num_lookahead_tokens,
            use_cache=False,
            **kwargs,
        )
        if input_features_mask is None:
            heard = outputs.last_hidden_state.flatten(0, 1)
        else:
            heard = outputs.last_hidden_state[outputs.attention_mask.bool()]
        return AutoGlmAudioFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.audio_projector(heard),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_mask=outputs.attention_mask,
        )

    def encode_audio_chunk(
        self, pcm: Any, state: AudioStreamState | None = None, *, final: bool = False
    ) -> tuple[torch.Tensor, AudioStreamState]:
        """The next samples of a live sound, as the decoder takes them.

        All chunks of a sound one after another equal `get_audio_features` of the whole (as the processor pads it).

        Args:
            pcm: 16 kHz mono samples, any number of them.
            state: What the call before returned; None begins a sound. It is changed in place.
            final: The sound ends here: its last chunk is padded with silence.

        Returns:
            Features [1, n, text_hidden] (n = 0 while a chunk is incomplete) and the state.

        Raises:
            ValueError: The sound was already finished.
        """
        # The caches of a stream are written in place, by calls that may differ in their inference mode.
        with torch.inference_mode(False), torch.no_grad():
            frames, state = hear(self.audio_tower, pcm, state, final=final)
            return self.audio_projector(frames), state

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        modality: str,
    ) -> torch.Tensor:
        """Where features [..., text_hidden] go: bool [batch, seq, 1].

        Raises:
            ValueError: The prompt has another number of placeholders than there are features.
        """
        token_id = self.config.image_token_id if modality == "image" else self.config.audio_token_id
        if input_ids is None:
            token = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
            mask = (inputs_embeds == token).all(-1)
        else:
            mask = input_ids == token_id
        given = features.shape[:-1].numel()
        # A fake tensor (planning without memory) has no values to count.
        if not isinstance(mask, FakeTensor) and (places := int(mask.sum())) != given:
            raise ValueError(
                f"The prompt has {places} {modality} placeholder tokens (id {token_id}) but the {modality} inputs give "
                f"{given} features: let the processor expand the placeholders, and pass every {modality} exactly once."
            )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        block_sequence_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AutoGlmModelOutputWithPast:
        """Encode images and sounds, put them in their places, run the decoder.

        Args:
            input_ids: [batch, seq].
            attention_mask: [batch, cached + seq] with 0 for padding, or a prepared 4D mask, taken as it is.
            pixel_values: [n_images, 3, size, size], in the order of their placeholders.
            input_features: [n_audio, frames, mels], in the order of their placeholders.
            input_features_mask: [n_audio, frames], false for padding.
            block_sequence_ids: [batch, cached + seq]: tokens of one number >= 0 see each other in both directions, -1
                is causal. None, or `config.bidirectional_prompt=False`: all causal.
            mm_encoder_outputs: Features encoded before, by modality ("image", "audio"), instead of raw inputs.

        Raises:
            ValueError: Counts of placeholders and features differ, or both or neither of input_ids and inputs_embeds.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        assert inputs_embeds is not None

        encoded: dict[str, Any] = dict(mm_encoder_outputs or {})
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values, return_dict=True)
        if input_features is not None:
            encoded["audio"] = self.get_audio_features(input_features, input_features_mask, return_dict=True)
        placed: dict[str, torch.Tensor] = {}
        for modality, output in encoded.items():
            features = output.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, features, modality)
            inputs_embeds = inputs_embeds.masked_scatter(mask, features)
            placed[modality] = features

        outputs = self.language_model(
            attention_mask=prompt_mask(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids, block_sequence_ids
            ),
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return AutoGlmModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=placed.get("image"),
            audio_hidden_states=placed.get("audio"),
        )


class AutoGlmForConditionalGeneration(AutoGlmPreTrainedModel, AutoGlmGenerationMixin):
    """AutoGlmModel with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: AutoGlmConfig) -> None:
        super().__init__(config)
        self.model = AutoGlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See AutoGlmModel.get_image_features."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See AutoGlmModel.get_audio_features."""
        return self.model.get_audio_features(input_features, input_features_mask, **kwargs)

    def encode_audio_chunk(
        self, pcm: Any, state: AudioStreamState | None = None, *, final: bool = False
    ) -> tuple[torch.Tensor, AudioStreamState]:
        """See AutoGlmModel.encode_audio_chunk."""
        return self.model.encode_audio_chunk(pcm, state, final=final)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        block_sequence_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AutoGlmCausalLMOutputWithPast:
        """As AutoGlmModel.forward, then the head.

        Args:
            labels: [batch, seq]; the loss predicts each from the tokens before it, -100 is left out.
            logits_to_keep: Only the last so many positions get logits (0: all), or these positions.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            input_features=input_features,
            input_features_mask=input_features_mask,
            block_sequence_ids=block_sequence_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return AutoGlmCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
        )


__all__ = ["AutoGlmForConditionalGeneration", "AutoGlmModel", "AutoGlmPreTrainedModel"]
