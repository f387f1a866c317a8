"""What each decoder layer keeps for the backward pass: everything or its input alone, on the device or on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from autoglm_lab.models.decoder_layers import decoder_layers
from autoglm_lab.models.recomputed_layer import recomputing
from autoglm_lab.schedule import LEAST_BYTES, Keeping
from autoglm_lab.training.activation_store import ActivationStore


class Layers:
    """Lets decoder layers keep what they are told to, while `active`.

    Args:
        model: its decoder's layers are called with hidden states first.
        least: bytes; what is smaller stays on the device.
    """

    def __init__(self, model: Any, *, least: int = LEAST_BYTES) -> None:
        self.modules = decoder_layers(model)
        self._store = ActivationStore(next(model.parameters()).device, least=least)
        self._store.ignoring(model.parameters())
        self.keepings: tuple[Keeping, ...] = tuple(Keeping() for _ in self.modules)

    @property
    def store(self) -> ActivationStore:
        return self._store

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """One forward and backward pass as told."""
        self._store.begin_step()
        changed = []
        for index, (module, keeping) in enumerate(zip(self.modules, self.keepings, strict=True)):
            forward = self._forward(index, module, keeping)
            if forward is not None:
                module.__dict__["forward"] = forward
                changed.append(module)
        try:
            yield
        finally:
            for module in changed:
                module.__dict__.pop("forward", None)

    def _forward(self, index: int, module: nn.Module, keeping: Keeping) -> Callable[..., Any] | None:
        plain: Callable[..., Any] = type(module).forward.__get__(module)
        if keeping.recompute:
            return recomputing(module, index, self._store.put if keeping.on_host else None)
        if keeping.on_host:

            def offloaded(hidden: Tensor, *rest: Any, **named: Any) -> Any:
                with self._store.hooks(index):
                    return plain(hidden, *rest, **named)

            return offloaded
        return None
