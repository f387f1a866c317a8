"""The running mean of what learns: steadier than its last values, since steps on few dialogues pull to and fro."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoglm_lab.errors import TrainingError


class RunningMean:
    """The exponential moving average of some parameters over the steps, in float32 on the host.

    `torch.optim.swa_utils.AveragedModel` copies a module in its own dtype, in which small changes are lost.

    Args:
        parameters: by their names.
        decay: of a step, from 0 to 1: about ``1 / (1 - decay)`` steps count. At first less, so that the values from
            before the first step are soon forgotten: ``(1 + step) / (10 + step)``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = dict(parameters), decay
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step ``step``, the first of which is 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            value = parameter.detach().to("cpu", torch.float32, copy=True)
            held = self._mean.get(name)
            self._mean[name] = value if held is None else held.lerp_(value, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Let the parameters be their means; without a step they stay as they are."""
        for name, value in self._mean.items():
            self._parameters[name].copy_(value)

    def write(self, path: Path) -> None:
        save_file(self._mean, path)

    def read(self, path: Path) -> None:
        """Raises `TrainingError` where the file is not there, or holds other parameters."""
        found = load_file(path) if path.is_file() else {}
        if {n: v.shape for n, v in found.items()} != {n: p.shape for n, p in self._parameters.items()}:
            raise TrainingError(
                f"'{path.parent}' is a checkpoint of a training without such a mean: resume with the same ema"
            )
        self._mean = found
