"""The one thread that writes to a dashboard's widgets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SHORTEST = 0.05
"""Least seconds between two refreshes, however often someone asks."""


class Refresher:
    """Calls ``tick`` again and again on a thread of its own.

    Args:
        tick: refreshes, and returns after how many seconds it wants to be called again; None ends the thread.
    """

    def __init__(self, tick: Callable[[], float | None]) -> None:
        self._tick = tick
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoglm-lab dashboard", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Refresh soon. From any thread; never blocks."""
        self._asked.set()

    def join(self) -> None:
        """Wait until the thread has ended, a few seconds at most."""
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while (pause := self._tick()) is not None:
            time.sleep(SHORTEST)
            self._asked.wait(max(0.0, pause - SHORTEST))
            self._asked.clear()
