"""A family of models as a test builds it: tiny, with random weights that make every input matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from autoglm_lab.models.skeleton import model_class
from tests.unit.models.families.rendering import Media, TinyProcessor


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: as people know it.
        config: makes the tiny configuration.
        modules: what anatomy finds.
        media: how it takes an image, a sound.
        sequence: tensors that its processor adds, from the ids.
        model: makes the model where transformers' Auto classes would take another class for the configuration.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    modules: tuple[str, ...]
    media: Mapping[str, Media] = field(default_factory=dict)
    sequence: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    model: Callable[[PreTrainedConfig], Any] | None = None

    def build(self) -> Any:
        """The model, in float32, equal for equal families."""
        torch.manual_seed(0)
        config = self.config()
        make = model_class(config)._from_config if self.model is None else self.model
        model = make(config).eval()
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            embeddings = model.get_input_embeddings().weight
            for name, weight in model.named_parameters():
                scale = 0.5 if weight is embeddings else 1.5
                if weight.ndim > 1 and not name.endswith("A_log"):
                    weight.normal_(0, scale * (weight.numel() / weight.shape[0]) ** -0.5)
        return model

    def processor(self) -> TinyProcessor:
        return TinyProcessor(self.media, self.sequence)
