"""`RemoteConversations`: the dialogues of this side, and the turns of them under way, one after the other in each."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from autoglm_lab.engine.protocol import Answer, ConversationInfo, Turn
from autoglm_lab.engine.remote.history import History, WireMessage
from autoglm_lab.engine.remote.loop import Loop
from autoglm_lab.engine.remote.memory import ServerMemory
from autoglm_lab.errors import ConversationError, EndpointError, LabError

Ask = Callable[[Any, list[WireMessage], dict[str, Any]], Awaitable[Answer]]
"""Asks the endpoint for one turn: the job, everything to send, and the fields of the request."""


class RemoteConversations:
    """Keeps what was said, and lets turns of one conversation wait for each other.

    Args:
        host: of the endpoint, for errors.
        loop: where turns run.
        ask: see `Ask`.
        ended: called after each turn, however it ended.

    Attributes:
        rate: tokens a second of the last answer that decoded.
    """

    def __init__(self, host: str, loop: Loop, ask: Ask, ended: Callable[[], None]) -> None:
        self._host, self._loop, self._ask, self._ended_turn = host, loop, ask, ended
        self._histories: dict[str, History] = {}
        self._gates: dict[str, asyncio.Lock] = {}
        self._running: dict[Turn, Any] = {}
        self._lock = threading.Lock()
        self.rate: float | None = None

    def infos(self) -> tuple[ConversationInfo, ...]:
        with self._lock:
            return tuple(history.info(name) for name, history in self._histories.items())

    @property
    def running(self) -> dict[Turn, Any]:
        """The turns under way and what reads each."""
        return dict(self._running)

    def begin(self, job: Any, media: Literal["resend", "strip"], request: dict[str, Any], *, replace: bool) -> None:
        """Ask for a turn when those before it in its conversation have ended. From any thread; returns at once.

        Args:
            job: a `RemoteTurn`; what is new in it is ``job.new``.
            media: whether images and sounds of earlier turns go along again.
            replace: forget what was said before.
        """
        name = job.turn.conversation
        with self._lock:
            history = self._histories.setdefault(name, History())
            history.busy += 1
        self._running[job.turn] = job
        self._loop.run(self._answer(job, history, media, request, replace=replace))

    def cancel(self, job: Any) -> None:
        """Stop a turn; what came of it stays."""
        self._loop.call(lambda: job.task and job.task.cancel())

    def drop(self, name: str, memory: ServerMemory | None) -> None:
        """Forget a conversation.

        Args:
            memory: of a server of ours, which forgets it too; None: the server keeps none.

        Raises:
            ConversationError: there is none of this name, or a turn of it is under way.
        """
        with self._lock:
            history = self._histories.get(name)
            if history is not None and history.busy:
                raise ConversationError(f"conversation '{name}' has a turn under way: stop it first")
        infos = self.infos() if memory is None else memory.conversations()
        if memory is not None and any(info.name == name for info in infos):
            memory.drop(name)
        elif history is None:
            names = ", ".join(info.name for info in infos) or "none"
            raise ConversationError(f"there is no conversation '{name}'; there are: {names}")
        with self._lock:
            self._histories.pop(name, None)

    async def _answer(
        self,
        job: Any,
        history: History,
        media: Literal["resend", "strip"],
        request: dict[str, Any],
        *,
        replace: bool,
    ) -> None:
        turn, job.task = job.turn, asyncio.current_task()
        try:
            async with self._gates.setdefault(turn.conversation, asyncio.Lock()):
                if replace:
                    history.messages.clear()
                messages = history.asking(job.new, media=media)
                try:
                    # Stopped before it began: nothing is asked.
                    answer = job.answer("cancelled") if turn.cancelled else await self._ask(job, messages, request)
                except asyncio.CancelledError:
                    answer = job.answer("cancelled")
                self._keep(history, job.new, answer)
        except asyncio.CancelledError:
            self._ended(turn, history)
            turn.emit(job.answer("cancelled"))
        except LabError as error:
            self._ended(turn, history)
            turn.fail(error)
        except Exception as error:  # noqa: BLE001 - whoever waits for the turn gets it
            self._ended(turn, history)
            turn.fail(EndpointError(f"{self._host}: {type(error).__name__}: {error}"))
        else:
            self._ended(turn, history)
            turn.emit(answer)

    def _keep(self, history: History, new: list[WireMessage], answer: Answer) -> None:
        if answer.finish_reason == "cancelled" and not answer.text:
            return
        usage = answer.usage
        history.messages += [*new, {"role": "assistant", "content": answer.text}]
        history.turns += 1
        history.tokens = usage.prompt_tokens + usage.completion_tokens
        history.prompt += usage.prompt_tokens
        history.cached += usage.cached_tokens
        self.rate = answer.timings.tokens_per_second or self.rate

    def _ended(self, turn: Turn, history: History) -> None:
        with self._lock:
            history.busy -= 1
            if not (history.busy or history.messages):
                self._histories = {name: one for name, one in self._histories.items() if one is not history}
        self._running.pop(turn, None)
        self._ended_turn()
