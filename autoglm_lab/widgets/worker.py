"""What a person sets off runs here, off the kernel's comm thread; what is under way shows as busy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Place = TypeVar("Place", bound=Hashable)


class Worker(Generic[Place]):
    """Lanes of one thread each: actions of one lane run one after another, lanes do not wait for each other.

    Args:
        changed: called after an action began or ended, from any thread.
        failed: called with where the action was set off and its error.
    """

    def __init__(self, changed: Callable[[], None], failed: Callable[[Place, BaseException], None]) -> None:
        self._changed, self._failed = changed, failed
        self._lock = threading.Lock()
        self._lanes: dict[str, ThreadPoolExecutor] = {}
        self._busy: list[tuple[Place, str]] = []
        self._closed = False

    def work(self, place: Place, key: str, action: Callable[[], object], lane: str) -> None:
        """Queue ``action``; ``key`` counts as busy at ``place`` until it has ended. Returns at once."""
        with self._lock:
            if self._closed:
                return
            if lane not in self._lanes:
                self._lanes[lane] = ThreadPoolExecutor(1, thread_name_prefix=f"autoglm-lab {lane}")
            self._busy.append((place, key))
            self._lanes[lane].submit(self._run, place, key, action)
        self._changed()

    def busy(self, place: Place) -> list[str]:
        """Keys of what is queued or under way at ``place``."""
        with self._lock:
            return sorted({key for where, key in self._busy if where == place})

    def close(self) -> None:
        """Drop what is queued; what is under way ends by itself."""
        with self._lock:
            self._closed = True
            for lane in self._lanes.values():
                lane.shutdown(wait=False, cancel_futures=True)
            self._lanes.clear()
            self._busy.clear()

    def _run(self, place: Place, key: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 -- whatever an action raises is shown where it was set off
            self._failed(place, error)
        finally:
            with self._lock:
                if (place, key) in self._busy:
                    self._busy.remove((place, key))
            self._changed()
