"""Configuration of the tri-modal AutoGLM architecture: a ViT, a streaming Conformer, a GLM decoder and projectors."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GlmConfig, NemotronAsrStreamingEncoderConfig, ViTConfig
from transformers.configuration_utils import PreTrainedConfig

from .chat_format import AUDIO, BEGIN_AUDIO, BEGIN_IMAGE, END, END_AUDIO, END_IMAGE, IMAGE, PAD, SPECIAL_TOKENS


@strict
class AutoGlmConfig(PreTrainedConfig):
    """What builds an AutoGlmModel.

    Args:
        vision_config: ViTConfig or dict; `image_size / patch_size` must be a multiple of `vision_merge`.
        audio_config: NemotronAsrStreamingEncoderConfig or dict; 16 kHz, `num_mel_bins` log-mels.
        text_config: GlmConfig or dict.
        image_token_id, audio_token_id: The placeholder that one image or audio feature replaces.
        image_begin_token_id, image_end_token_id, audio_begin_token_id, audio_end_token_id: Markers around placeholders.
        vision_feature_size: Width of the features that the vision tower gives.
        vision_merge: Side of the square of patches that become one feature (2: 14 x 14 patches -> 49 features).
        projector_hidden_size: Inner width of both projectors; None for the decoder's width.
        projector_hidden_act: Their activation.
        bidirectional_prompt: Whether `block_sequence_ids` open bidirectional attention within a user turn, as GLM has
            it; False makes every token causal.
        initializer_range: Standard deviation of the projectors' and the head's initial weights.
        tie_word_embeddings: Whether the head shares the decoder's embedding.
    """

    model_type = "autoglm"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": ViTConfig,
        "audio_config": NemotronAsrStreamingEncoderConfig,
        "text_config": GlmConfig,
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vision_config: Any = None
    audio_config: Any = None
    text_config: Any = None
    image_token_id: int = SPECIAL_TOKENS.index(IMAGE)
    audio_token_id: int = SPECIAL_TOKENS.index(AUDIO)
    image_begin_token_id: int = SPECIAL_TOKENS.index(BEGIN_IMAGE)
    image_end_token_id: int = SPECIAL_TOKENS.index(END_IMAGE)
    audio_begin_token_id: int = SPECIAL_TOKENS.index(BEGIN_AUDIO)
    audio_end_token_id: int = SPECIAL_TOKENS.index(END_AUDIO)
    vision_feature_size: int = 512
    vision_merge: int = 1
    projector_hidden_size: int | None = None
    projector_hidden_act: str = "gelu"
    bidirectional_prompt: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            # GlmConfig's own ids are those of the public vocabulary and may lie outside a small one.
            ids = {"pad_token_id": SPECIAL_TOKENS.index(PAD), "eos_token_id": SPECIAL_TOKENS.index(END)}
            self.text_config = {**ids, **(self.text_config or {})}
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        side, rest = divmod(self.vision_config.image_size, self.vision_config.patch_size)
        if rest or side % self.vision_merge:
            raise ValueError(
                f"vision_merge={self.vision_merge} does not divide the {side} patches a side of an image "
                f"(image_size {self.vision_config.image_size}, patch_size {self.vision_config.patch_size})"
            )

    @property
    def image_seq_length(self) -> int:
        """Tokens an image."""
        side = self.vision_config.image_size // self.vision_config.patch_size // self.vision_merge
        return int(side * side)


__all__ = ["AutoGlmConfig"]
