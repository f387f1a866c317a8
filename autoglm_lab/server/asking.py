"""From a request to a turn of the engine: a place, the media read, and the turn cancelled when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from autoglm_lab.engine.protocol import Turn
from autoglm_lab.errors import AdmissionError
from autoglm_lab.server.media import read_dialogue
from autoglm_lab.server.request_error import RequestError
from autoglm_lab.server.service import Service

Result = TypeVar("Result")

_log = logging.getLogger("autoglm_lab.server")
_LOGGED = 4000
_PATIENCE = 30.0


class ClientGoneError(Exception):
    """Who asked has closed the connection."""


@dataclass(frozen=True)
class Question:
    """What one request asks.

    Attributes:
        messages: as the client sent them.
        options: for ``policy.generation``.
        conversation: a named one, whose keys and values the service keeps; None: nothing is kept but a prefix.
        replace: the messages are the whole dialogue; False: they go on from what the named conversation has.
        force: try it also where the plan says that it cannot fit.
    """

    messages: Sequence[dict[str, Any]]
    options: dict[str, Any]
    conversation: str | None = None
    replace: bool = True
    force: bool = False


async def begin(service: Service, question: Question) -> Turn:
    """Wait for a place and submit a turn. The place is given back when the turn has really ended.

    Raises:
        RequestError: 429, too many wait.
        LabError: the messages cannot be read or answered.
    """
    await service.places.take()
    loop, began = asyncio.get_running_loop(), time.monotonic()
    work = asyncio.ensure_future(asyncio.to_thread(_submit, service, question))
    left = False

    def leave() -> None:
        nonlocal left
        if not left:
            left = True
            service.places.leave(time.monotonic() - began)

    def seated(done: asyncio.Future[Turn]) -> None:
        if done.cancelled() or done.exception() is not None:
            leave()
        else:
            turn = done.result()
            turn.on_change(lambda: _soon(loop, leave) if turn.done else None)

    work.add_done_callback(seated)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_cancel)
        raise


async def answering(service: Service, question: Question) -> Turn:
    """A turn that is under way: what could be refused of it was not.

    Where the plan says that it does not fit beside the others, it waits until one of those has ended and is tried
    again, so that load makes clients wait and never the memory run out.

    Raises:
        RequestError: 429, too many wait, or the memory is not free in time.
        LabError: the messages cannot be read or answered.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        turn = await begin(service, question)
        try:
            return await started(turn)
        except AdmissionError as error:
            if not service.places.running:  # nobody's end would make room
                raise
            if time.monotonic() > deadline:
                raise RequestError(429, str(error), "memory_busy", retry_after=_PATIENCE) from None
        except BaseException:
            turn.cancel()
            raise
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.places.one_left(), _PATIENCE)


async def started(turn: Turn) -> Turn:
    """The turn, once there is something of it to tell.

    Raises:
        LabError: what it failed with before that.
    """
    async with contextlib.aclosing(aiter(turn)) as events:  # type: ignore[type-var]
        async for _ in events:
            break
    return turn


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client closes the connection.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def disconnected(request: Request) -> None:
    """Wait until the client closes the connection. The body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}-{secrets.token_hex(16)}"


def _submit(service: Service, question: Question) -> Turn:
    if service.settings.log_prompts:
        _log.info("asked: %s", json.dumps(question.messages, ensure_ascii=False)[:_LOGGED])
    messages = read_dialogue(question.messages, service.settings)
    private = question.conversation is None
    return service.engine.submit(
        messages,
        conversation=question.conversation or f"request {secrets.token_hex(4)}",
        replace=private or question.replace,
        keep=not private,
        force=question.force,
        **question.options,
    )


def _cancel(done: asyncio.Future[Turn]) -> None:
    if not done.cancelled() and done.exception() is None:
        done.result().cancel()


def _soon(loop: asyncio.AbstractEventLoop, call: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody counts places any more
        loop.call_soon_threadsafe(call)
