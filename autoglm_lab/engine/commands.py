"""Commands for the engine's thread: who may give them, and the thread that runs them one by one."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from autoglm_lab.errors import EngineClosedError

Result = TypeVar("Result")
NAME = "autoglm-lab engine"
_TICK = 0.25


class Worker(Protocol):
    """What the thread does where there is no command."""

    @property
    def has_work(self) -> bool:
        """Whether a round is to follow at once."""
        ...

    def work(self) -> None:
        """One round."""
        ...

    def finish(self) -> None:
        """The last thing: nothing may wait for the thread afterwards."""
        ...


class Commands:
    """A queue of commands, and the thread that takes them between two rounds of work.

    Args:
        worker: held weakly, so that an engine which nobody holds any more goes away; the thread ends with it.
    """

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None

    def serve(self, worker: Worker) -> None:
        """Begin the thread."""
        self._thread = threading.Thread(target=_serve, args=(weakref.ref(worker), self), name=NAME, daemon=True)
        self._thread.start()

    @property
    def here(self) -> bool:
        """Whether this is the thread that runs commands."""
        return threading.current_thread() is self._thread

    @property
    def closed(self) -> bool:
        return self._closed

    def call(self, run: Callable[[], Result]) -> Result:
        """Run a command on the thread, and wait for what it gives; at once where this is the thread."""
        return run() if self.here else self.post(run).result()

    def post(self, run: Callable[[], Result]) -> Future[Result]:
        """Let the thread run a command.

        Raises:
            EngineClosedError: it ended.
        """
        future: Future[Result] = Future()
        # Nothing is posted after the end: whoever posted it would wait for ever.
        with self._gate:
            if self._closed:
                raise EngineClosedError("this workbench was closed: load the model again")
            self._inbox.put((run, future))
        return future

    def close(self) -> bool:
        """End the thread after the commands before this, and wait for it. False: that was done already."""
        with self._gate:
            if self._closed:
                return False
            self._closed = True
            self._inbox.put(None)
        if self._thread is not None and not self.here:
            self._thread.join(timeout=30)
        return True

    # for the thread

    def take(self, wait: float = 0.0) -> bool | None:
        """Run the next command. False: there is none; None: the thread is to end, now and whenever it is asked again.

        Args:
            wait: seconds to wait for one.
        """
        try:
            command = self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()
        except queue.Empty:
            return False
        if command is None:
            self._inbox.put(None)
            return None
        run, future = command
        try:
            future.set_result(run())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the command gets it
            future.set_exception(error)
        return True


def _serve(reference: weakref.ref[Worker], commands: Commands) -> None:
    busy = False
    while True:
        taken = commands.take(0.0 if busy else _TICK)
        worker = reference()
        if worker is None:
            return
        if taken is None:
            worker.finish()
            return
        if taken:
            busy = True
        else:
            worker.work()
            busy = worker.has_work
        del worker
