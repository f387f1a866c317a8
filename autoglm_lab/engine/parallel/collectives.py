"""What the ranks of a model compute together: sums and rows put together, over NCCL, or gloo where there is no GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

dist: Any = torch.distributed  # which says little of its types
_PATIENCE, _MEETING = timedelta(minutes=30), timedelta(minutes=2)


class LeftError(RuntimeError):
    """Another rank has left the group, or is gone."""


class Collectives:
    """The group that one rank belongs to (see `models.rank_model.Group`). All ranks are on this machine.

    Args:
        meeting: a file that the ranks find each other through; in a folder of this user alone.
        device: where this rank's tensors are.
    """

    def __init__(self, meeting: Path, rank: int, ranks: int, device: torch.device) -> None:
        self._meeting, self._rank, self._ranks, self._device = meeting, rank, ranks, device
        self._store: Any = None
        self._group: Any = None

    def meet(self, round_number: int) -> None:
        """Form a group, with every rank that is told the same number; the one before is left.

        Raises:
            LeftError: the others did not come.
        """
        self.leave()
        if self._store is None:
            self._store = dist.FileStore(str(self._meeting), self._ranks)
            self._store.set_timeout(_MEETING)
        store = dist.PrefixStore(f"round {round_number}", self._store)
        self._group = self._nccl(store) if self._device.type == "cuda" else self._gloo(store)
        self.add_up(torch.zeros(1, device=self._device))

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor; ``tensor`` is written to where it is contiguous."""
        together = tensor.contiguous()
        with _told():
            self._joined().allreduce([together]).wait()
        return together

    def put_together(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor behind one another along the last dimension."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self._ranks)]
        with _told():
            self._joined().allgather([parts], [tensor.contiguous()]).wait()
        return torch.cat(parts, dim=-1)

    def leave(self) -> None:
        """End the group. Ranks that wait for this one in it get an error, here and elsewhere; from any thread."""
        group, self._group = self._group, None
        if group is not None and self._device.type == "cuda":
            group.abort()

    def _joined(self) -> Any:
        if self._group is None:
            raise LeftError("this rank has left its group")
        return self._group

    def _gloo(self, store: Any) -> Any:
        options = dist.ProcessGroupGloo._Options()  # noqa: SLF001 - torch has no public name for it
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]  # noqa: SLF001
        options._timeout = _PATIENCE  # noqa: SLF001
        return dist.ProcessGroupGloo(store, self._rank, self._ranks, options)

    def _nccl(self, store: Any) -> Any:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        # A rank that is gone is seen by its link; NCCL's own watch would end this process.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        torch.cuda.set_device(self._device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _PATIENCE  # noqa: SLF001
        return dist.ProcessGroupNCCL(store, self._rank, self._ranks, options)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError | LeftError):
            raise
        raise LeftError(str(error).split(". ", maxsplit=1)[0]) from None
