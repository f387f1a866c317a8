"""A model without its weights: parameters on the meta device, computed buffers real, ties made."""

from __future__ import annotations

import contextlib
import copy
import re
import threading

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from autoglm_lab.errors import LoadError
from autoglm_lab.models.tensor_parallel import marked, narrow, share_of

_AUTO = (
    "AutoModelForMultimodalLM",
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModel",
)

# While it builds a model, transformers makes its dtype the default of the whole process: of two that build at the same
# time, the one that ends last would leave the other's behind.
_building = threading.Lock()


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that ``config`` names, or else the most capable one that transformers knows for it.

    Raises:
        LoadError: there is none.
    """
    known: list[type[PreTrainedModel]] = []
    for auto_name in _AUTO:
        auto = getattr(transformers, auto_name, None)
        mapping = getattr(auto, "_model_mapping", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            known += found if isinstance(found, list | tuple) else [found]
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    for cls in known:
        if cls.__name__ in named:
            return cls
    for name in named:
        exported = getattr(transformers, name, None)
        if isinstance(exported, type) and issubclass(exported, PreTrainedModel):
            return exported
    if not known:
        raise LoadError(f"transformers {transformers.__version__} has no model for {type(config).__name__}")
    return known[0]


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of ``config`` with parameters on the meta device and every buffer real, on the CPU.

    Buffers get the values that ``from_pretrained`` gives them: computed ones by the model's own initialisation.
    Parameters that a model insists to keep in float32 keep it. The configuration is copied; one that is marked as a
    rank's (`tensor_parallel.mark`) gives that rank's model.
    """
    cls = model_class(config)
    with _building, torch.device("meta"), _safe_creation():
        model = cls._from_config(copy.deepcopy(config), dtype=dtype)
    _keep_in_float32(model, dtype)
    for parameter in model.parameters():
        # transformers' mark for "has its value": its initialisation then fills buffers only.
        parameter.__dict__["_is_hf_initialized"] = True
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))
    model.initialize_weights()
    rank = marked(config)
    if rank is not None:
        narrow(model, share_of(model, *rank))
    return model.eval()  # type: ignore[no-any-return]


def _safe_creation() -> contextlib.AbstractContextManager[object]:
    """Transformers' own cure for models that read a value while they are built (drop-path schedules)."""
    try:
        from transformers.initialization import meta_device_safe_creation_ops
    except ImportError:
        return contextlib.nullcontext()
    return meta_device_safe_creation_ops()


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    loose = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept = strict | loose if dtype == torch.float16 else strict if dtype == torch.bfloat16 else set()
    if not kept:
        return
    pattern = re.compile("|".join(rf"(^|\.){name}(\.|$)" for name in sorted(kept)))
    replaced: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not pattern.search(f"{path}.{name}") or not parameter.is_floating_point():
                continue
            if id(parameter) not in replaced:
                replaced[id(parameter)] = nn.Parameter(parameter.float(), requires_grad=parameter.requires_grad)
            setattr(module, name, replaced[id(parameter)])
