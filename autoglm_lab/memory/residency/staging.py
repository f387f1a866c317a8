"""Pinned buffers that bytes of files pass through on their way to a GPU: one is filled while another is emptied.

They are taken for as long as weights are read and given back afterwards: at most `STAGED` bytes of the host.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from autoglm_lab.memory.residency.slab import HostSlab

CHUNK = 16 << 20
LANES = 12
STAGED = CHUNK * LANES * 2
"""Most bytes of the host that all buffers take together."""


class Staging:
    """Buffers for reading weights to one device. Use it as a context: the last one out gives them back.

    Args:
        chunk: bytes of a buffer, and of the pieces that files are read in.
        lanes: most threads that read, each with two buffers.

    Attributes:
        staged: whether the device cannot be read into directly.
    """

    def __init__(self, device: torch.device, *, chunk: int = CHUNK, lanes: int = LANES) -> None:
        self.device, self.chunk, self.lanes = device, chunk, lanes
        self.staged = device.type == "cuda"
        self._users = 0
        self._lanes: list[Lane] = []
        self._scratch: Tensor | None = None
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes of the host that the buffers take now."""
        return sum(lane.held for lane in self._lanes)

    def __enter__(self) -> Self:
        self._users += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if self._users == 0:
            self.settle()
            lanes, self._lanes, self._scratch = self._lanes, [], None
            for lane in lanes:
                lane.close()

    def lane(self, number: int) -> Lane:
        """The buffers of one thread."""
        while len(self._lanes) <= number:
            self._lanes.append(Lane(self.chunk, pin=self.device.type == "cuda"))
        return self._lanes[number]

    def settle(self) -> None:
        """Wait until the device has read every buffer."""
        for lane in self._lanes:
            lane.settle()

    def give(self, buffer: Tensor, target: Tensor) -> None:
        """Let the device copy ``buffer`` to ``target``, on the current stream.

        Where the dtypes differ the device converts: what it needs for it is one more chunk, used by one copy after the
        other in the order of the stream.
        """
        if buffer.dtype == target.dtype or target.device.type == "cpu":
            target.copy_(buffer, non_blocking=True)
            return
        with self._lock:
            if self._scratch is None:
                self._scratch = torch.empty(self.chunk, dtype=torch.uint8, device=target.device)
            there = self._scratch[: buffer.numel() * buffer.element_size()].view(buffer.dtype)
            there.copy_(buffer, non_blocking=True)
            target.copy_(there)


class Lane:
    """Two buffers that one thread fills in turn; one where nobody empties it in the background."""

    def __init__(self, chunk: int, *, pin: bool) -> None:
        self._chunk, self._pin = chunk, pin
        self._slabs: list[HostSlab] = []
        self._passed: list[torch.cuda.Event | None] = []
        self._turn = -1

    @property
    def held(self) -> int:
        return sum(slab.committed for slab in self._slabs)

    def next(self, nbytes: int) -> Tensor:
        """A buffer that the device is done with, as ``uint8`` ``[nbytes]``, at most a chunk."""
        self._turn = (self._turn + 1) % (2 if self._pin else 1)
        if self._turn == len(self._slabs):
            self._slabs.append(self._fresh(nbytes))
            self._passed.append(None)
        passed, self._passed[self._turn] = self._passed[self._turn], None
        if passed is not None:
            passed.synchronize()
        if self._slabs[self._turn].size < nbytes:
            self._slabs[self._turn].close()
            self._slabs[self._turn] = self._fresh(nbytes)
        return self._slabs[self._turn].alias()[:nbytes]

    def given(self, stream: torch.cuda.Stream | None) -> None:
        """Note that ``stream`` was given the last buffer to read; None: it is read already."""
        if stream is not None:
            event = torch.cuda.Event(blocking=True)
            event.record(stream)
            self._passed[self._turn] = event

    def settle(self) -> None:
        """Wait until the device has read both buffers."""
        for event in self._passed:
            if event is not None:
                event.synchronize()

    def close(self) -> None:
        """Give the buffers back. The device must be done with them."""
        slabs, self._slabs, self._passed, self._turn = self._slabs, [], [], -1
        for slab in slabs:
            slab.close()

    def _fresh(self, nbytes: int) -> HostSlab:
        size = 1 << max(12, (nbytes - 1).bit_length())  # so that it seldom has to grow
        slab = HostSlab(min(size, max(nbytes, self._chunk)), pin=self._pin)
        try:
            slab.commit()
            slab.touch()
        except BaseException:
            slab.close()
            raise
        slab.pin()
        return slab
