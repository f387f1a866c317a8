"""Where one module's weights lie besides the device: in files, in someone else's tensors, in a host copy."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from autoglm_lab.memory.events import Event
from autoglm_lab.memory.host_machine import host_memory
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.residency import weights
from autoglm_lab.memory.residency.pinned import PinnedBudget
from autoglm_lab.memory.residency.reader import Progress
from autoglm_lab.memory.residency.slab import HostSlab, View, views_of
from autoglm_lab.memory.residency.staging import Staging
from autoglm_lab.models.checkpoint import FileTensor
from autoglm_lab.models.tensor_sources import CutTensor, DummyTensor, HeldTensor, PackedTensor, Source
from autoglm_lab.units import MiB, format_bytes

_SPARE = 256 * MiB
Fetch = Callable[[Tensor], None]
"""Copies the device's region into a host region, and waits for it."""


class Keeper(Protocol):
    """What a module asks of the `Residency` that it belongs to."""

    def refuse_if_off(self, name: str, why: str) -> None: ...
    def tell(self, event: Event) -> None: ...
    def check_open(self) -> None: ...
    def spill_path(self, name: str) -> Path: ...
    def settle(self) -> None: ...


class Backing:
    """The copies of one module's weights that are not on the device.

    Args:
        views: where each tensor lies in a region.
        nbytes: of a region.
        sources: where each tensor's values come from.
        pinned: counts the pinned bytes of the model; None: host copies are not pinned.

    Attributes:
        sources: as given, or the file that they were written to; empty: only the device or the host copy has them.
        host: the host copy; None: there is none.
        note: why the host copy is slow, or is none; empty where there is nothing to say.
        filled: bytes of the host copy that were read from the sources.
    """

    def __init__(
        self,
        name: str,
        views: Mapping[str, View],
        nbytes: int,
        sources: Mapping[str, Source],
        keeper: Keeper,
        pinned: PinnedBudget | None,
    ) -> None:
        self._name, self._views, self._nbytes, self._keeper, self._pinned = name, views, nbytes, keeper, pinned
        self.sources: dict[str, Source] = dict(sources)
        self.host: HostSlab | None = None
        self.note = ""
        self.filled = 0

    @property
    def held(self) -> bool:
        """Whether the weights still lie where someone else put them (an attached model)."""
        sources = self.sources.values()
        return bool(sources) and all(isinstance(source, HeldTensor) for source in sources)

    @property
    def origin(self) -> str:
        """Where a wake takes them from, for its event."""
        if self.host is not None:
            return "from host"
        kinds = {type(_plain(source)) for source in self.sources.values()}
        return "from disk" if FileTensor in kinds else "made up" if DummyTensor in kinds else "from this process"

    @property
    def host_bytes(self) -> int:
        host = self.host
        return 0 if host is None else host.committed

    def fill(self, region: Tensor, progress: Progress, staging: Staging | None = None) -> None:
        """Give a region the values of the sources.

        Args:
            staging: of the region's device; None: made for this once.
        """
        weights.fill_all(views_of(region, self._views), self.sources, staging or Staging(region.device), progress)

    def changed(self) -> None:
        """Forget the sources: the device has other values now."""
        self.sources = {}

    def to_host(self, fetch: Fetch | None) -> str:
        """Make the host copy, or write it anew: from the device by ``fetch``, else from the sources.

        Returns:
            What was made of it, for the event; empty where nothing was made.

        Raises:
            MemoryError: the host has no room for it.
        """
        host, fresh = self.host, self.host is None
        if host is None:
            host = self._fresh()
        try:
            if fetch is not None:
                fetch(host.alias())
            else:
                self.filled = 0
                self.fill(host.alias(), self._count)
                weights.drop_pool()
        except BaseException as error:
            if fresh:
                traceback.clear_frames(error.__traceback__)  # whose variables still view the copy
                host.close()
            raise
        self.host, self.note = host, host.note
        return "first host copy made" if fresh and fetch is not None else ""

    def _count(self, nbytes: int) -> None:
        self.filled += nbytes

    def _fresh(self) -> HostSlab:
        host = HostSlab(self._nbytes, pin=self._pinned is not None, budget=self._pinned)
        free = host_memory()[1]
        if free < host.size + _SPARE:
            raise MemoryError(f"the host has {format_bytes(free)} free for a copy of {format_bytes(host.size)}")
        try:
            host.commit()
            host.touch()
        except (MemoryError, OSError):
            host.close()
            raise MemoryError(f"the host has no {format_bytes(host.size)} for a copy") from None
        host.pin()
        return host

    def to_disk(self, device: Callable[[], Tensor] | None) -> str:
        """Make sure that the weights lie in files (or still in an attached model's tensors).

        Args:
            device: the device's region, where that is newer than the host copy or the only one; None: not there.

        Returns:
            What was made, as `to_host`.

        Raises:
            ModuleError: the disk is full.
        """
        if all(isinstance(self.sources.get(name), FileTensor | HeldTensor) for name in self._views):
            return ""
        start = time.perf_counter()
        path = self._keeper.spill_path(self._name)
        if device is not None:
            region = device()
        elif self.host is not None:
            region = self.host.alias()
        else:  # made up, and never asked for: the values can be made up again
            return ""
        self.sources = dict(weights.write(path, views_of(region, self._views)))
        seconds, why = time.perf_counter() - start, f"the only other copy, in {path.parent}"
        nbytes = sum(view.nbytes for view in self._views.values())
        self._keeper.tell(Event(time.time(), "spilled", self._name, nbytes, seconds, why))
        return "written to disk first"

    def drop_host(self) -> None:
        """Give the host copy back."""
        if self.host is not None:
            host, self.host = self.host, None
            host.close()

    def rows(self, place: Literal["host", "disk"]) -> Iterator[Row]:
        """Ledger rows of what is held in ``place``."""
        host = self.host
        if place == "host" and host is not None and host.committed:
            counts = "host copy, pinned" if host.pinned else "host copy, pageable"
            yield Row(self._name, "weights", "host", host.committed, counts)
        sources = self.sources
        if place == "disk" and sources:
            read = [_plain(source) for source in sources.values()]
            on_disk = sum(source.nbytes for source in read if isinstance(source, FileTensor))
            yield Row(self._name, "weights", "disk", on_disk, "in safetensors, read when the module wakes")


def _plain(source: Source) -> Source:
    """Where the numbers of a source lie as they were made."""
    source = source.source if isinstance(source, PackedTensor) else source
    return source.source if isinstance(source, CutTensor) else source
