"""What of a model changes while a workbench holds it, beside where its weights lie."""

from __future__ import annotations

from typing import Any

from torch import nn


class Original:
    """A model as it was found: which modules were training, and what some keep of their last conversation."""

    def __init__(self, model: nn.Module) -> None:
        modules: list[Any] = list(model.modules())
        self._training = [(module, module.training) for module in modules]
        self._deltas = [(module, module.rope_deltas) for module in modules if hasattr(module, "rope_deltas")]

    def restore(self) -> None:
        """Make it so again."""
        for module, training in self._training:
            module.training = training
        for module, deltas in self._deltas:
            module.rope_deltas = deltas
