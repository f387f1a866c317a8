"""The places for answers under way: so many at a time, so many waiting in order, and no more."""

from __future__ import annotations

import asyncio
from collections import deque

from autoglm_lab.server.request_error import RequestError

_FIRST_GUESS = 2.0
_MOST_WAIT = 60.0


class Places:
    """Places of one service. Only its event loop calls this.

    Args:
        running: most that have a place.
        waiting: most that wait for one.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._most, self._most_waiting = running, waiting
        self._queue: deque[asyncio.Future[None]] = deque()
        self._seconds = _FIRST_GUESS
        self._left = asyncio.Event()
        self.running = 0

    @property
    def waiting(self) -> int:
        return sum(not one.done() for one in self._queue)

    async def take(self) -> None:
        """Wait for a place; who came first gets it first.

        Raises:
            RequestError: 429, so many wait already.
        """
        if self.running < self._most and not self.waiting:
            self.running += 1
            return
        if self.waiting >= self._most_waiting:
            wait = min(_MOST_WAIT, self._seconds * (self.waiting + 1) / self._most)
            message = (
                f"{self.running} answers are under way and {self.waiting} requests wait, the most that is allowed: "
                "try again after the seconds of Retry-After"
            )
            raise RequestError(429, message, "queue_full", retry_after=wait)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it got its place just as it went away
                self._pass_on()
            raise

    def leave(self, seconds: float) -> None:
        """Give a place back after ``seconds`` of use; the next one who waits gets it."""
        self._seconds += 0.1 * (seconds - self._seconds)
        self._left.set()
        self._left = asyncio.Event()
        self._pass_on()

    async def one_left(self) -> None:
        """Wait until the next place is given back."""
        await self._left.wait()

    def _pass_on(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
