"""`LiveTurn`: sound goes to a server of ours while it is spoken, and the answer comes back on the same socket."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlencode

import httpx
import numpy as np

from autoglm_lab.engine.live import with_sound
from autoglm_lab.engine.messages import SAMPLING_RATE, Limits, Message, audio_part
from autoglm_lab.engine.protocol import Answer, ReasoningDelta, TextDelta
from autoglm_lab.engine.remote.history import wire_message
from autoglm_lab.engine.remote.link import CONNECT_SECONDS
from autoglm_lab.engine.remote.loop import Loop
from autoglm_lab.engine.remote.turn import RemoteTurn
from autoglm_lab.engine.wire import EXTENSION, from_wire
from autoglm_lab.errors import ConversationError, EndpointError, LabError, MediaError

_PACKET = 1 << 17
"""Samples of one message."""
_CLOSE_SECONDS = 2.0


@dataclass
class LiveTurn(RemoteTurn):
    """A turn whose question is spoken: `feed` and `ask` may be called from any thread.

    Args:
        messages: what is said beside the sound.
        loop: where the socket is.
        timeout: seconds without a word after the question, after which the answer counts as broken off.
        sound: the form of samples in the history, see `Dialect`.
    """

    messages: tuple[Message, ...] = ()
    loop: Loop = field(default_factory=Loop)
    timeout: float = 120.0
    sound: str = "FLOAT"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lock = threading.Lock()
        self._question = self.new
        self._packets: list[np.ndarray[Any, Any]] = []
        self._samples = 0
        self._out: asyncio.Queue[bytes | str] = asyncio.Queue()
        self._patience = asyncio.Timeout(None)
        self.asked, self.phase = False, "idle"

    def feed(self, pcm: Any) -> None:
        """Send samples ``[samples]``, float, 16 kHz mono.

        Raises:
            MediaError: not such samples, or the sound is over its limit.
            ConversationError: the question is closed.
        """
        packet, most = audio_part(pcm).samples, Limits().audio_seconds
        with self._lock:
            if self.asked:
                raise ConversationError("the question is closed: it takes no more sound")
            if self._samples + packet.size > most * SAMPLING_RATE:
                raise MediaError(f"the live sound is over its limit of {most:.0f} s")
            self._samples += packet.size
            self._packets.append(packet)
            for start in range(0, packet.size, _PACKET):
                self._send(packet[start : start + _PACKET].astype("<f4").tobytes())

    def ask(self, text: str | None) -> None:
        """Close the sound; the answer begins.

        Raises:
            MediaError: there was no sound.
            ConversationError: it was asked before.
        """
        with self._lock:
            if self.asked:
                raise ConversationError("this turn was already asked")
            if not self._samples:
                raise MediaError("the live sound is empty: feed samples before asking")
            self.asked = True
            whole = with_sound(self.messages, audio_part(np.concatenate(self._packets)), text)
            self._question = [wire_message(message, self.sound) for message in whole]
            self._began, self.phase = time.monotonic(), "prefill"
            self._send(json.dumps({"type": "ask", "text": text}))

    async def read(self, messages: Sequence[dict[str, Any]], request: Mapping[str, Any]) -> Answer:
        """Open the socket, send what is fed until the question is closed, and read the answer."""
        import websockets
        from websockets.asyncio.client import connect

        fields = {name: value for name, value in request.items() if name != "extra_body"}
        fields |= request.get("extra_body", {})
        named = {"conversation": fields.pop("conversation")} if "conversation" in fields else {}
        address = f"{self.link.url.replace('http', 'ws', 1)}/audio/live?{urlencode({'format': 'f32le', **named})}"
        connected = False
        try:
            async with connect(
                address,
                additional_headers={"Authorization": f"Bearer {self.link.api_key}"},
                proxy=True if self.link.trust_env else None,
                open_timeout=CONNECT_SECONDS,
                close_timeout=_CLOSE_SECONDS,
                max_size=None,
            ) as socket:
                connected = True
                self._hear(await socket.recv(), "ready")
                await socket.send(json.dumps({"type": "start", "messages": list(messages), **fields}))
                await self._talk(socket)
        except websockets.InvalidStatus as error:
            told = error.response.body or b""
            raise self.link.refusal(error.response.status_code, told.decode(errors="replace"), "live sound") from None
        except (websockets.WebSocketException, OSError) as error:
            if not connected and isinstance(error, OSError):
                raise self.link.unreachable(httpx.ConnectError(str(error))) from None
            raise self._broken(None if isinstance(error, websockets.ConnectionClosedOK) else error) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, LabError):
                raise
            raise EndpointError(f"{self.link.host} sent what is no word of a live turn: {error}") from None
        return self.answer("stop" if self._whole is None else self._whole.finish_reason)

    async def _talk(self, socket: Any) -> None:
        """Send what comes out of `feed` and `ask`, and hear the server meanwhile: it may refuse at any time."""
        hearing, speaking = asyncio.ensure_future(self._listen(socket)), asyncio.ensure_future(self._speak(socket))
        try:
            await asyncio.wait({hearing, speaking}, return_when=asyncio.FIRST_COMPLETED)
            if not hearing.done():
                speaking.result()
            await hearing
        finally:
            for one in (hearing, speaking):
                one.cancel()
            await asyncio.gather(hearing, speaking, return_exceptions=True)

    async def _listen(self, socket: Any) -> None:
        async with self._patience:
            while self._whole is None:
                self._hear(await socket.recv())
                if self._patience.when() is not None:
                    self._wait_no_longer()

    async def _speak(self, socket: Any) -> None:
        while isinstance(message := await self._out.get(), bytes):
            await socket.send(message)
        self.new = self._question
        await socket.send(message)
        self._wait_no_longer()

    def _wait_no_longer(self) -> None:
        """Than `timeout` from now on: before the question a person may be silent for as long as they like."""
        self._patience.reschedule(asyncio.get_running_loop().time() + self.timeout)

    def _hear(self, message: Any, wanted: str = "") -> None:
        """Take one message of the server.

        Raises:
            LabError: it is an error.
        """
        told = json.loads(message)
        kind = told["type"]
        if kind == "error":
            self._raise(told["error"])
        if wanted and kind != wanted:
            raise EndpointError(f"{self.link.host} said {kind!r} where {wanted!r} was due: is it of another version?")
        if kind == "text":
            self._emit([TextDelta(told["text"])])
        elif kind == "reasoning":
            self._emit([ReasoningDelta(told["text"])])
        elif kind == "event":
            self._take_more([told])
        elif kind == "answer":
            self._whole = from_wire(Answer, told["answer"])

    def _raise(self, said: Mapping[str, Any]) -> None:
        message = str(said.get("message"))
        raise self.link.named(str(said.get("code")), message, "the question", said.get(EXTENSION)) or EndpointError(
            f"{self.link.host} refused the question: {message}"
        )

    def _send(self, message: bytes | str) -> None:
        self.loop.call(partial(self._out.put_nowait, message))
