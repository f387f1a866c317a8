"""What of a model's text stays on the host for good: its embedding, and parts of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.residency.host_rows import HostRows
from autoglm_lab.memory.residency.layer_stream import LayerStream
from autoglm_lab.memory.residency.pinned import PinnedBudget
from autoglm_lab.models.placement import HostShare
from autoglm_lab.models.tensor_sources import Source


class HostWeights:
    """Weights that the GPU uses from the host. Making one takes their tensors over; `fill` gives them values.

    Attributes:
        names: the tensors.
        nbytes: of them.
        passing: bytes of them that pass the bus for every token.
    """

    def __init__(
        self,
        model: Any,
        share: HostShare,
        sources: Mapping[str, Source],
        accelerator: Accelerator,
        pinned: PinnedBudget,
    ) -> None:
        self.names, self.passing = share.names, share.passing
        self._rows = None if share.rows is None else HostRows(share.rows, sources, accelerator, pinned)
        self._layers = LayerStream(model, share.parts, sources, accelerator, pinned) if share.parts else None
        self.nbytes = sum(one.nbytes for one in (self._rows, self._layers) if one is not None)

    def fill(self) -> None:
        """Take the memory and read the weights.

        Raises:
            OutOfMemoryError, LoadError: as `HostRows.fill` and `LayerStream.fill`. Nothing is held.
        """
        if self._layers is not None:
            self._layers.fill()
        if self._rows is not None:
            try:
                self._rows.fill()
            except BaseException:
                self.close()
                raise

    def settle(self) -> None:
        """Call it before a captured step is replayed."""
        if self._layers is not None:
            self._layers.settle()

    def holdings(self) -> Iterator[Row]:
        """Rows on both sides (see `ledger.Owner`)."""
        for one in (self._rows, self._layers):
            if one is not None:
                yield from one.holdings()

    def close(self) -> None:
        """Give every byte back. The model cannot be used afterwards."""
        for one in (self._rows, self._layers):
            if one is not None:
                one.close()
