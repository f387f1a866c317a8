"""What passes from one device to the next: hidden states once, what every layer reads beside them once a device.

accelerate's hooks move every input of every layer anew, which a decode step, made of thousands of small launches,
feels; these remember until the end of a forward what they moved by name (positions, masks).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoglm_lab.models.spread import Spread


def cross(model: nn.Module, spread: Spread) -> None:
    """Let the inputs of every part come to its device, as long as the model lives."""
    sides = [_Side(device) for device in spread.devices]
    for side in sides:
        model.register_forward_hook(side.forget, always_call=True)
    for path, number in spread.crossings.items():
        model.get_submodule(path).register_forward_pre_hook(sides[number].enter, with_kwargs=True)


class _Side:
    """One device, and what came to it during the forward under way."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._came: dict[int, tuple[Tensor, Tensor]] = {}

    def forget(self, *_: Any) -> None:
        """A forward has ended."""
        self._came.clear()

    def enter(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        """A part on this device begins: its inputs come, and kernels of Triton's are launched here from now on."""
        del module
        if self._cuda and torch.cuda.current_device() != self._device.index:
            torch.cuda.set_device(self._device)
        # Hidden states come by position, are read once, and are large: they are not remembered.
        moved = tuple(one.to(self._device) if isinstance(one, Tensor) else self._here(one) for one in given)
        return moved, {name: self._here(value) for name, value in named.items()}

    def _here(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.device == self._device else self._come(value)
        if type(value) in (tuple, list):
            return type(value)(map(self._here, value))
        if type(value) is dict:
            return {name: self._here(one) for name, one in value.items()}
        return value

    def _come(self, value: Tensor) -> Tensor:
        found = self._came.get(id(value))
        if found is None:
            # The tensor itself is held beside its copy, so that its number stays its own.
            found = self._came[id(value)] = value, value.to(self._device)
        return found[1]
