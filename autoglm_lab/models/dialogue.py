"""Whether a model can hold a dialogue at all: read token ids and give logits, on one device."""

from __future__ import annotations

import inspect
from typing import Any

from autoglm_lab.errors import LoadError


def refuse_unfit(model: Any) -> None:
    """Say what is in the way, and which part of the model would do.

    Raises:
        LoadError: an encoder-decoder, a model without a forward over token ids or without a head, or one that is spread
            over several devices.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise LoadError(
            f"{name} is an encoder-decoder model: its answers do not go on from a prompt, so there is no dialogue to "
            "keep. Models with a decoder alone can be used, with encoders before it"
        )
    if not (_reads_tokens(model) and model.can_generate()):
        parts = [path for path, part in model.named_children() if _reads_tokens(part) and _generates(part)]
        advice = (
            f"use its part: {', '.join(f'model.{part}' for part in parts)}" if parts else "use the class with a head"
        )
        raise LoadError(f"{name} does not read token ids and give logits for the next one: {advice}")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise LoadError(f"{name} is spread over {', '.join(devices)}: move it to one device first")


def _reads_tokens(model: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "input_ids" in parameters and ("past_key_values" in parameters or "cache_params" in parameters)


def _generates(part: Any) -> bool:
    return hasattr(part, "can_generate") and bool(part.can_generate())
