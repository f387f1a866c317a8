"""An embedding in pinned host memory: the GPU reads the rows that it looks up over the bus, a few kilobytes a token."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.cuda_driver import Export
from autoglm_lab.memory.host_machine import host_memory
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.residency import weights
from autoglm_lab.memory.residency.binding import placeholder
from autoglm_lab.memory.residency.pinned import PinnedBudget
from autoglm_lab.memory.residency.slab import HostSlab, lay_out, views_of
from autoglm_lab.memory.residency.staging import Staging
from autoglm_lab.models.placement import HostPart
from autoglm_lab.models.tensor_sources import Source


class HostRows:
    """The embedding of one model on the host. Making one takes its tensors over; `fill` gives them values.

    Args:
        part: the embedding.
        sources: where its values come from, by name.
        pinned: counts the page-locked bytes.
    """

    def __init__(
        self, part: HostPart, sources: Mapping[str, Source], accelerator: Accelerator, pinned: PinnedBudget
    ) -> None:
        self._part, self._accelerator = part, accelerator
        self._sources = {name: sources[name] for name in part.tensors}
        self._views, nbytes = lay_out(part.tensors)
        cuda = accelerator.kind == "cuda"
        self._host = HostSlab(nbytes, pin=cuda, budget=pinned if cuda else None)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self._part.nbytes

    def fill(self) -> None:
        """Take the memory and read the weights.

        Raises:
            OutOfMemoryError: the host has no room, or not so much that can be pinned. Nothing is held.
            LoadError: a file is gone or damaged. Nothing is held.
        """
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._take()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # whose variables still view the memory
            self.close()
            raise

    def holdings(self) -> Iterator[Row]:
        """The row of what is held (see `ledger.Owner`)."""
        if self._host.committed:
            yield Row("text embedding", "weights", "host", self._host.committed, "pinned; the GPU reads rows of it")

    def close(self) -> None:
        """Give every byte back. The embedding cannot be used afterwards."""
        if self._accelerator.kind == "cuda" and self._host.committed:
            torch.cuda.synchronize(self._accelerator.device)
        for tensor in self._part.tensors.values():
            tensor.data = placeholder(tensor.dtype, tensor.device).expand(tensor.shape)
        self._host.close()

    def _take(self) -> None:
        needed, advice = self._host.size, ["set placement.host_bytes to 0"]
        try:
            self._host.commit()
            self._host.touch()
        except (MemoryError, OSError):
            raise OutOfMemoryError("load", needed, host_memory()[1], advice) from None
        self._host.pin()
        if self._accelerator.kind == "cuda" and not self._host.pinned:
            raise OutOfMemoryError("load", needed, 0, ["raise the policy's 'pinned'", *advice])
        targets = views_of(self._host.alias(), self._views)
        weights.fill_all(targets, self._sources, Staging(torch.device("cpu")), lambda _: None)
        self._sources = {}
        del targets
        region = self._seen_by_device()
        for name, view in views_of(region, self._views).items():
            self._part.tensors[name].data = view

    def _seen_by_device(self) -> Tensor:
        whole = self._host.alias()
        if self._accelerator.kind == "cpu":
            return whole
        return torch.as_tensor(Export(whole.data_ptr(), whole.numel()), device=self._accelerator.device)
