"""What the passes of a training step hold beyond what stood when its micro-batch began."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autoglm_lab.memory.high_water import Watch, high_water
from autoglm_lab.memory.ledger import Row


class StepPeaks:
    """The most bytes of the forward and of the backward pass, and the ledger's row of activations.

    Both count from the same moment, so that the larger one is what a micro-batch needs. Gradients that come with the
    first backward pass of a step are among them.

    Args:
        device: where the model computes.

    Attributes:
        most: bytes by pass, ``forward`` and ``backward``; empty where the system keeps no such marks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, high_water(device)
        self._watch: Watch | None = None
        self._pass = ""
        self._start = 0
        self.most: dict[str, int] = {}

    def enter(self, name: str) -> None:
        """Begin the ``forward`` or the ``backward`` pass, or, with no name, end the one under way."""
        if not self._marks.available:
            return
        if self._watch is not None:
            beyond = self._watch.start - self._start + self._marks.close(self._watch, None).work
            self.most[self._pass] = max(beyond, self.most.get(self._pass, 0))
        self._pass, self._watch = name, self._marks.open() if name else None
        if name == "forward" and self._watch is not None:
            self._start = self._watch.start

    def holdings(self) -> Iterator[Row]:
        """What the pass under way holds now; from any thread. On a CPU no allocator tells that."""
        name = self._pass
        if not name or self._device.type != "cuda":
            return
        held = torch.cuda.memory_allocated(self._device) - self._start
        if held > 0:
            counts = f"tensors made since the micro-batch began whose {name} pass is under way"
            yield Row("activations", "activations", "device", held, counts, within="allocator")
