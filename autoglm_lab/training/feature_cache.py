"""Outputs of frozen encoders for the data's images and sounds: computed once, kept on the host."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autoglm_lab.memory.ledger import Row


class FeatureCache:
    """Encoder outputs by content, on the host, for as long as a training runs.

    Args:
        device: the model's: where it is the host, the features count there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        return sum(features.nbytes for features in self._kept.values())

    def clear(self) -> int:
        """What the encoder asks for when weights were written: the frozen ones were not, so everything stays true."""
        return 0

    def get(self, key: str) -> Tensor | None:
        return self._kept.get(key)

    def put(self, key: str, features: Tensor) -> None:
        self._kept[key] = features.detach().to("cpu", copy=True)

    def has(self, key: str) -> bool:
        return key in self._kept

    def has_any(self, beginning: str) -> bool:
        return any(key.startswith(beginning) for key in self._kept)

    def holdings(self) -> Iterator[Row]:
        if self._kept:
            counts = f"encoder outputs of {len(self._kept)} image(s) and sound(s) of the training data"
            if self._device.type == "cpu":
                yield Row("training features", "owner", "device", self.nbytes, counts, within="allocator")
            else:
                yield Row("training features", "owner", "host", self.nbytes, counts)
