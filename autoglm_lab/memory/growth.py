"""The driver's own memory, named: what CUDA and its libraries took for this process at which event."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from autoglm_lab.units import format_bytes


class DriverGrowth:
    """What the driver took after the context was read, by the event that it was taken at.

    CUDA loads a kernel at its first launch, and takes memory for streams, graphs and libraries when they are first
    used. None of it is in torch's allocator; it shows only in what NVML says of the process.

    Args:
        beyond: bytes that the driver holds for this process beyond its context, now; None: that cannot be told now.
    """

    def __init__(self, beyond: Callable[[], int | None]) -> None:
        self._beyond = beyond
        self._lock = threading.Lock()
        self._parts: dict[str, int] = {}
        self._times: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by event; those that took nothing are left out."""
        with self._lock:
            return {what: nbytes for what, nbytes in self._parts.items() if nbytes}

    def times(self, what: str) -> int:
        """How often ``what`` was begun to be measured."""
        return self._times.get(what, 0)

    def __str__(self) -> str:
        return ", ".join(f"{what} {format_bytes(nbytes)}" for what, nbytes in self.parts.items())

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Count what the driver takes while this is open under ``what``.

        Brackets may lie in one another and on several threads: what one has counted, no other counts again. One at
        whose begin or end nothing can be told counts nothing.
        """
        with self._lock:
            self._times[what] = self._times.get(what, 0) + 1
        before = self._unnamed()
        try:
            yield
        finally:
            with self._lock:
                beyond = self._beyond()
                if before is not None and beyond is not None:
                    taken = beyond - sum(self._parts.values()) - before
                    self._parts[what] = self._parts.get(what, 0) + taken

    def forget(self) -> None:
        """Begin anew: the context was read again, and holds what was taken so far."""
        with self._lock:
            self._parts.clear()

    def _unnamed(self) -> int | None:
        with self._lock:
            beyond = self._beyond()
            return None if beyond is None else beyond - sum(self._parts.values())
