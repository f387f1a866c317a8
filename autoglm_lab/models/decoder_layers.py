"""The parts of a decoder that learn or keep activations: its layers, its linear layers, and what is before its head."""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import nn

from autoglm_lab.models.lean_layers import decoder_of
from autoglm_lab.models.quantized_linear import QuantizedLinear


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder's layers in order; empty where there is no list of them."""
    decoder = decoder_of(model)
    lists = [child for child in decoder.modules() if isinstance(child, nn.ModuleList) and len(child) > 1]
    whole = [one for one in lists if not any(other is not one and _holds(other, one) for other in lists)]
    longest = max(whole, key=lambda one: sum(p.numel() for p in one.parameters()), default=None)
    return [] if longest is None else list(longest)


def linear_layers(model: Any) -> list[str]:
    """Names of the linear layers of the model's decoder."""
    decoder = decoder_of(model)
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    names = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    return [f"{prefix}.{name}" if prefix else name for name in names]


def core_of(model: Any) -> tuple[nn.Module, nn.Linear] | None:
    """The model without its head, and the head, where that is all that is between them."""
    base = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    text = model.config.get_text_config()
    extras = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale")
    plain = not any(getattr(text, name, None) for name in extras)
    if not isinstance(base, nn.Module) or type(head) not in {nn.Linear, QuantizedLinear} or not plain:
        return None
    takes = inspect.signature(type(base).forward).parameters
    return (base, cast("nn.Linear", head)) if "input_ids" in takes else None


def _holds(one: nn.Module, other: nn.Module) -> bool:
    return any(child is other for child in one.modules())
