"""`Loop`: an event loop in a thread of its own, where the turns of a remote engine run."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

_END_SECONDS = 5.0


class Loop:
    """Runs coroutines; any thread may hand one over. The thread starts with the first."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._endings: list[Callable[[], Awaitable[None]]] = []

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Begin a coroutine."""
        asyncio.run_coroutine_threadsafe(coroutine, self._running())

    def call(self, function: Callable[[], object]) -> None:
        """Call ``function`` in the loop, after what was begun before."""
        self._running().call_soon_threadsafe(function)

    def at_end(self, ending: Callable[[], Awaitable[None]]) -> None:
        """Await ``ending`` when the loop is closed."""
        self._endings.append(ending)

    def close(self) -> None:
        """Cancel what runs, let go of connections, and end the thread. Again is no harm."""
        with self._lock:
            loop, self._loop, self._closed = self._loop, None, True
        if loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._finish(loop), loop)
        if threading.current_thread() is not self._thread:
            self._thread.join(_END_SECONDS)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise RuntimeError("the loop was closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_serve, args=(self._loop,), name="autoglm-lab remote engine", daemon=True
                )
                self._thread.start()
            return self._loop

    async def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for ending in self._endings:
            with contextlib.suppress(Exception):
                await ending()
        loop.stop()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
