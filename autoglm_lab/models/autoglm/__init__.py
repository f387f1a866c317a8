"""The tri-modal AutoGLM architecture in transformers' conventions; importing it registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .audio_chunks import AudioChunks
from .audio_tower import AudioStreamState
from .configuration_autoglm import AutoGlmConfig
from .feature_extraction_autoglm import AutoGlmFeatureExtractor
from .modeling_autoglm import AutoGlmForConditionalGeneration, AutoGlmModel, AutoGlmPreTrainedModel
from .processing_autoglm import SPECIAL_TOKENS, AutoGlmProcessor, special_tokens

AutoConfig.register("autoglm", AutoGlmConfig, exist_ok=True)
AutoModel.register(AutoGlmConfig, AutoGlmModel, exist_ok=True)
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(AutoGlmConfig, AutoGlmForConditionalGeneration, exist_ok=True)
AutoFeatureExtractor.register(AutoGlmConfig, AutoGlmFeatureExtractor, exist_ok=True)
AutoProcessor.register(AutoGlmConfig, AutoGlmProcessor, exist_ok=True)

__all__ = [
    "SPECIAL_TOKENS",
    "AudioChunks",
    "AudioStreamState",
    "AutoGlmConfig",
    "AutoGlmFeatureExtractor",
    "AutoGlmForConditionalGeneration",
    "AutoGlmModel",
    "AutoGlmPreTrainedModel",
    "AutoGlmProcessor",
    "special_tokens",
]
