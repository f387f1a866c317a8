"""Clients that a service must outlive: they vanish, send garbage, and go over every limit."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import struct
import zlib
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

_PATIENCE = 60.0
_TINY = 2000
Rude = Callable[["Target", random.Random], Awaitable[str]]


class Target:
    """The service that is tried.

    Args:
        url: ending in ``/v1``.
        key: of its clients.
        bodies: questions that it answers.
        body_bytes: its limit of one body.
    """

    def __init__(self, url: str, key: str | None, bodies: list[dict[str, Any]], body_bytes: int) -> None:
        self.url, self.key, self.bodies, self.body_bytes = url, key, bodies, body_bytes

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        """A connection of its own."""
        given = self.key if key is None else key
        headers = {} if given is None else {"authorization": f"Bearer {given}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=_PATIENCE, trust_env=False)

    async def post(self, body: Any, key: str | None = None, path: str = "chat/completions") -> int:
        """The status that a body is answered with; bytes go out as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.client(key) as client:
            response = await client.post(path, content=content, headers={"content-type": "application/json"})
        return response.status_code


async def vanish(target: Target, chance: random.Random) -> str:
    """Ask, read some lines, and close the connection."""
    lines, most = 0, chance.randrange(20)
    path = chance.choice(["chat/completions", "responses"])
    body = chance.choice(target.bodies)
    asked = body if path == "chat/completions" else {"input": "Who are you?"}
    async with target.client() as client, client.stream("POST", path, json={**asked, "stream": True}) as response:
        async for _ in response.aiter_lines():
            lines += 1
            if lines > most:
                break
    return str(response.status_code)


async def hang_up(target: Target, chance: random.Random) -> str:
    """Ask for a whole answer and do not wait for it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(chance.random()):
            await target.post(chance.choice(target.bodies))
    return "gone"


async def half(target: Target, chance: random.Random) -> str:
    """Announce a body, send a part of it, and close the connection."""
    at = urlsplit(target.url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    head = (
        f"POST {at.path}/chat/completions HTTP/1.1\r\nhost: {at.netloc}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {target.key}\r\ncontent-length: 5000\r\n\r\n"
    )
    whole = (head + '{"messages": [').encode()
    writer.write(whole[: chance.randrange(1, len(whole))])
    await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    del reader
    return "gone"


async def live(target: Target, chance: random.Random) -> str:
    """Speak, perhaps ask, and go in the middle of it; or speak nonsense."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed

    address = f"{target.url.replace('http', 'ws', 1)}/audio/live"
    async with connect(
        address, additional_headers={"Authorization": f"Bearer {target.key}"}, proxy=None, open_timeout=_PATIENCE
    ) as socket:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(chance.randrange(1, 6)):
                await socket.send(chance.randbytes(chance.choice([3200, 3200, 3200, 3201])))
            if chance.random() < 0.5:
                await socket.send(json.dumps({"type": "ask", "text": "What do you hear?"}))
                await socket.recv()
            if chance.random() < 0.3:
                await socket.send(chance.choice(["{", '{"type": "sing"}', '{"type": "start", "n": 3}']))
                await socket.recv()
    return "gone"


async def watch(target: Target, chance: random.Random) -> str:
    """Look at samples and events for a moment."""
    lines, most = 0, chance.randrange(1, 8)
    async with target.client() as client, client.stream("GET", "memory/events?rate=10") as response:
        async for _ in response.aiter_lines():
            lines += 1
            if lines > most:
                break
    return str(response.status_code)


async def garbage(target: Target, chance: random.Random) -> str:
    """Send what is no JSON."""
    return str(await target.post(chance.randbytes(_TINY)))


async def limits(target: Target, chance: random.Random) -> str:
    """Ask for what the service has not, or for more than it gives."""
    hi = [{"role": "user", "content": "Hi"}]
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "word " * 20_000}]},
        {"messages": [{"role": "user", "content": "w" * 500_000}]},
        {"messages": hi, "n": 9},
        {"messages": hi, "temperature": -1},
        {"messages": hi, "max_tokens": 0},
        {"messages": hi, "conversation": "main"},
        {"messages": hi, "force": True},
        {"messages": hi, "model": "../../etc/passwd"},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
        {"messages": [{"role": "user", "content": [_image(_bomb(60_000))]}]},
        {"messages": [{"role": "user", "content": [_image(b"no picture")]}]},
        {"messages": []},
    ]
    return str(await target.post(chance.choice(bodies)))


async def wrong_key(target: Target, chance: random.Random) -> str:
    """Try a key that is none, or change the memory without the admin's."""
    if chance.random() < 0.5:
        return str(await target.post(target.bodies[0], key=f"guess {chance.random()}"))
    return str(await target.post({"kv": {"max_tokens": 16}}, path="memory/reclaim"))


async def huge(target: Target, chance: random.Random) -> str:
    """Send more than a body may have. The service may close before all of it is sent."""
    try:
        return str(await target.post(b" " * round(target.body_bytes * (1 + chance.random()))))
    except (httpx.ReadError, httpx.WriteError):
        return "413"


KINDS: dict[str, tuple[Rude, frozenset[str]]] = {
    "vanish": (vanish, frozenset({"200", "429"})),
    "hang up": (hang_up, frozenset({"gone"})),
    "half": (half, frozenset({"gone"})),
    "live": (live, frozenset({"gone"})),
    "watch": (watch, frozenset({"200"})),
    "garbage": (garbage, frozenset({"400"})),
    "limits": (limits, frozenset({"400", "403", "404", "429"})),
    "wrong key": (wrong_key, frozenset({"401", "403"})),
    "huge": (huge, frozenset({"413"})),
}
"""What each does, and what a service in order answers."""


async def be_rude(target: Target, kind: str, chance: random.Random) -> tuple[str, bool]:
    """Do it once: what came of it, and whether that is in order."""
    do, fine = KINDS[kind]
    try:
        came = await do(target, chance)
    except (httpx.HTTPError, OSError) as error:
        came = type(error).__name__
    return f"{kind} {came}", came in fine


def _image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def _bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that says it has ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
