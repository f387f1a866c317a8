"""Page-locked host memory: how much of it may be taken, and touching fresh memory fast."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

_SLICE = 64 << 20
_THREADS = 8
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python's mmap does not name


class PinnedBudget:
    """Counts the page-locked bytes of one model.

    Attributes:
        limit: most bytes. Lowering it counts for what is pinned from then on.
        used: bytes that are pinned now.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Count ``nbytes`` more, where the limit allows it."""
        with self._lock:
            if self.used + nbytes > self.limit:
                return False
            self.used += nbytes
            return True

    def give(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes


def touch(address: int, nbytes: int) -> None:
    """Let the system back fresh memory with pages, in several threads: one thread is far slower than the bus.

    Args:
        address: of memory that nothing was written to yet.

    Raises:
        MemoryError: the system has none left.
    """
    starts = range(0, nbytes, _SLICE)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1, max(1, len(starts)))) as threads:
        for _ in threads.map(lambda start: _touch(address + start, min(_SLICE, nbytes - start)), starts):
            pass


def _touch(address: int, nbytes: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "madvise"):
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if libc.madvise(address, nbytes, _POPULATE_WRITE) == 0:
            return
        if ctypes.get_errno() == errno.ENOMEM:
            raise MemoryError(f"the system has no {nbytes} bytes for a host copy")
    ctypes.memset(address, 0, nbytes)  # an older kernel
