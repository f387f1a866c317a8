"""What passes from one device to the next: accelerate's hooks, without its keeping of weights."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from autoglm_lab.models.spread import Spread


def cross(model: nn.Module, spread: Spread) -> None:
    """Let the inputs of every part come to its device, as long as the model lives."""
    skip = getattr(model, "_skip_keys_device_placement", None) or "past_key_values"
    for path, number in spread.crossings.items():
        add_hook_to_module(model.get_submodule(path), _Crossing(spread.devices[number], skip), append=True)


class _Crossing(AlignDevicesHook):  # type: ignore[misc]
    """Also makes the device the current one: that is where kernels of Triton's are launched."""

    def __init__(self, device: torch.device, skip: Any) -> None:
        super().__init__(execution_device=device, skip_keys=skip)
        self._device = device

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module  # the weights come and go by themselves

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        del module  # accelerate would move its weights away here, where it offloads
        return output
