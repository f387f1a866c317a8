"""Modules that compute in different dtypes, side by side: what passes from one to another is cast on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoglm_lab.models.anatomy import ModuleSpec


def join_dtypes(model: nn.Module, specs: Iterable[ModuleSpec], text: torch.dtype) -> None:
    """Cast what goes into every module but the text to its own dtype, and what its encoders give to the text's.

    Args:
        text: the dtype of the text, which the others write for.
    """
    for spec in specs:
        if spec.name == "text":
            continue
        for root in spec.roots:
            submodule = model.get_submodule(root)
            own = next((one.dtype for one in submodule.parameters() if one.is_floating_point()), text)
            submodule.register_forward_pre_hook(_into(own), with_kwargs=True)
            if spec.name != "head":  # logits are as exact as the head makes them
                submodule.register_forward_hook(_out_of(text))


def _into(dtype: torch.dtype) -> Callable[..., tuple[Any, Any]]:
    def hook(module: nn.Module, arguments: Any, named: Any) -> tuple[Any, Any]:
        del module
        return cast_floats(arguments, dtype), cast_floats(named, dtype)

    return hook


def _out_of(dtype: torch.dtype) -> Callable[..., Any]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        del module, arguments
        return cast_floats(output, dtype)

    return hook


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating-point tensor in it in ``dtype``: tensors, sequences, mappings, model outputs."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        changed = {key: cast_floats(one, dtype) for key, one in value.items()}
        return type(value)(**changed) if type(value) is not dict else changed
    if type(value) in {tuple, list}:
        return type(value)(cast_floats(one, dtype) for one in value)
    return value
