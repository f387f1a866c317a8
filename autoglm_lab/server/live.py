"""`/v1/audio/live`: a websocket that takes sound while it is spoken, and answers when it is asked.

The client may send ``{"type": "start", …}`` with settings of the answer and, where it keeps the dialogue itself, with
``messages``; then binary packets of 16 kHz mono samples, of any size; then ``{"type": "ask", "text": …}``. The service
sends ``ready``, ``text``, ``reasoning``, ``event``, ``answer`` and ``error``. After an answer it is ready again, in the
same dialogue.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import Field, ValidationError

from autoglm_lab.engine.protocol import MemoryEvent, ReasoningDelta, TextDelta, Turn
from autoglm_lab.engine.wire import to_wire
from autoglm_lab.errors import LabError
from autoglm_lab.server.access import check_asked
from autoglm_lab.server.chat import ChatMessage
from autoglm_lab.server.media import read_dialogue
from autoglm_lab.server.request_error import RequestError
from autoglm_lab.server.sampling import Sampling
from autoglm_lab.server.service import Service, role_in, service_of
from autoglm_lab.server.usage import answer_wire, usage_of

router = APIRouter()

_FORMATS: dict[str, tuple[np.dtype[Any], float]] = {
    "s16le": (np.dtype("<i2"), 1 / 32768),
    "f32le": (np.dtype("<f4"), 1.0),
}
_PACKET = 1 << 20
_TRIES = 200


class LiveRequest(Sampling):
    """``start``: how the answer is to be given, and to what. ``ask``: the end of the sound, and what else is asked.

    ``messages``: the whole dialogue up to the sound; None: what this connection, or the conversation, has of it.
    """

    type: Literal["start", "ask"]
    text: str | None = Field(None, max_length=100_000)
    messages: Annotated[list[ChatMessage], Field(max_length=4096)] | None = None


@router.websocket("/v1/audio/live")
async def live(socket: WebSocket, format: str = "s16le", conversation: str | None = None) -> None:  # noqa: A002 - the name in the address
    """Sound in, answers out, until the client closes."""
    service = service_of(socket)
    await socket.accept()
    name = conversation or f"live {secrets.token_hex(4)}"
    try:
        _check_format(format)
        check_asked(service.settings, role_in(socket), conversation=conversation)
        while not service.stopping:
            await _question(service, socket, name, format)
    except WebSocketDisconnect:
        return
    except Exception as error:  # noqa: BLE001 - the client is told, as far as it is still there
        told = service.metrics.failed("live", error)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await socket.send_json({"type": "error", **told.body()})
            await socket.close(1011 if told.status >= 500 else 1008)
    finally:
        if conversation is None:
            await _forget(service, name)


async def _question(service: Service, socket: WebSocket, name: str, form: str) -> None:
    """Take the sound and the question, and answer it. A place is held from the first packet on."""
    start: Callable[[], Turn] = partial(service.engine.submit, [], conversation=name, live=True)
    turn: Turn | None = None
    began = 0.0
    await socket.send_json({"type": "ready"})
    try:
        while True:
            packet, told = await _message(socket)
            if told is not None and told.type == "ask":
                break
            if told is not None:
                start = await _started(service, socket, told, name)
            if packet and turn is None:
                await service.places.take()
                began = time.monotonic()
                turn = await asyncio.to_thread(start)
            if packet and turn is not None:
                await asyncio.to_thread(turn.feed, _samples(packet, form))
        if turn is None:
            raise RequestError(400, "there was no sound: send binary packets before asking", "no_sound")
        await asyncio.to_thread(turn.ask, told.text)
        await _while_there(socket, _tell(service, socket, turn))
    finally:
        if turn is not None:
            turn.cancel()
        if began:
            service.places.leave(time.monotonic() - began)


async def _started(service: Service, socket: WebSocket, told: LiveRequest, name: str) -> Callable[[], Turn]:
    """What begins the turn, as the client wants it."""
    check_asked(service.settings, role_in(socket), conversation=None, force=told.force)
    options = told.generation(can_think=service.engine.capabilities.thinking)
    before: list[dict[str, Any]] = []
    if told.messages is not None:
        said = [message.model_dump() for message in told.messages]
        before = await asyncio.to_thread(read_dialogue, said, service.settings)
        options["replace"] = True
    return partial(service.engine.submit, before, conversation=name, live=True, force=told.force, **options)


def _check_format(form: str) -> None:
    if form not in _FORMATS:
        raise RequestError(400, f"unknown format: use {' or '.join(_FORMATS)}", "invalid_value", param="format")


async def _message(socket: WebSocket) -> tuple[bytes, LiveRequest | None]:
    """A packet, or what was said beside the sound."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    packet, text = message.get("bytes"), message.get("text")
    if packet is not None:
        return packet, None
    try:
        return b"", LiveRequest.model_validate_json(text or "")
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise RequestError(
            400, f"{where or 'message'}: {problem['msg']}", "invalid_value", param=where or None
        ) from None


async def _tell(service: Service, socket: WebSocket, turn: Turn) -> None:
    async for one in turn:
        if isinstance(one, TextDelta):
            await socket.send_json({"type": "text", "text": one.text})
        elif isinstance(one, ReasoningDelta):
            await socket.send_json({"type": "reasoning", "text": one.text})
        elif isinstance(one, MemoryEvent):
            await socket.send_json({"type": "event", "event": to_wire(one.event)})
        else:
            service.metrics.answered("live", one)
            await socket.send_json({"type": "answer", "answer": answer_wire(one), "usage": usage_of(one)})


async def _while_there(socket: WebSocket, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work`` as long as the client is there and says nothing."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(socket.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            if gone.result()["type"] == "websocket.disconnect":
                raise WebSocketDisconnect
            raise RequestError(409, "wait for the answer before sending more", "busy")
        task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def _samples(packet: bytes, form: str) -> Any:
    kind, scale = _FORMATS[form]
    if len(packet) % kind.itemsize or len(packet) > _PACKET:
        raise RequestError(400, f"a packet is whole samples of {form}, at most {_PACKET:,} bytes", "invalid_packet")
    return np.frombuffer(packet, kind).astype(np.float32) * scale


async def _forget(service: Service, name: str) -> None:
    """Drop the dialogue of a connection that is gone; a turn that was cancelled may need a moment to end."""
    engine = service.engine
    for _ in range(_TRIES):
        if engine.closed or all(one.name != name for one in engine.conversations()):
            return
        with contextlib.suppress(LabError):
            await asyncio.to_thread(engine.drop, name)
            return
        await asyncio.sleep(0.05)
