"""A move under way: a park or a wake that has begun, and the event that it comes to."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from autoglm_lab.memory.events import Event, EventKind


class Move:
    """A park or a wake. Whoever asked for it need not wait: reading what came of it does.

    It has the attributes of its `Event` and shows as it; each waits for the end. Where the device is the host, a move
    has ended when it is returned.
    """

    def __init__(self) -> None:
        self._future: Future[Event] = Future()

    @classmethod
    def ended(cls, event: Event) -> Move:
        """A move that is over, or that was not needed."""
        move = cls()
        move.finish(event)
        return move

    @property
    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout: float | None = None) -> Event:
        """Wait for the end.

        Args:
            timeout: seconds; None waits without end.

        Raises:
            TimeoutError: it has not ended in time; it goes on.
            LabError: why the module could not be moved; it is where it was.
        """
        return self._future.result(timeout)

    def wait(self) -> None:
        """Wait for the end, whatever came of it."""
        wait((self._future,))

    def then(self, call: Callable[[Move], None]) -> None:
        """Call ``call`` with this move when it has ended: at once if it has, else on the thread that ends it."""
        self._future.add_done_callback(lambda _: call(self))

    # as its event

    @property
    def time(self) -> float:
        return self.result().time

    @property
    def kind(self) -> EventKind:
        return self.result().kind

    @property
    def subject(self) -> str:
        return self.result().subject

    @property
    def nbytes(self) -> int | None:
        return self.result().nbytes

    @property
    def seconds(self) -> float | None:
        return self.result().seconds

    @property
    def why(self) -> str:
        return self.result().why

    def to_dict(self) -> dict[str, Any]:
        return self.result().to_dict()

    def __str__(self) -> str:
        return str(self.result())

    __repr__ = __str__

    # what the one who moves calls

    def finish(self, event: Event) -> None:
        self._future.set_result(event)

    def fail(self, error: BaseException) -> None:
        """End it with an error, without the frames that would keep tensors alive."""
        error.__context__ = error.__cause__ = None
        self._future.set_exception(error.with_traceback(None))

    def follow(self, other: Move) -> None:
        """End as ``other`` does."""
        other.then(self._end_as)

    def _end_as(self, other: Move) -> None:
        error = other._future.exception()
        if error is None:
            self.finish(other.result())
        else:
            self._future.set_exception(error)
