"""What every call passes before anything of it is read: access, the size of its body, and whether the service stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoglm_lab.server.access import check_access
from autoglm_lab.server.request_error import RequestError
from autoglm_lab.server.settings import ServerSettings

_SMALL, _PATIENCE = 64 << 10, 2.0


class Gate:
    """ASGI middleware. The role of who calls goes on in ``scope["state"]["role"]``.

    Args:
        stopping: whether the service was told to stop: then it begins nothing new.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, stopping: Callable[[], bool]) -> None:
        self._app, self._settings, self._stopping = app, settings, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        live = scope["type"] == "websocket"
        try:
            role = check_access(self._settings, scope.get("method", "GET"), scope["path"], headers)
            self._check_size(headers)
            self._check_open(scope["path"])
        except RequestError as no:
            if live:
                await send({"type": "websocket.close", "code": 1008, "reason": no.code})
            else:
                # What is not read of the body must not be taken for the next request.
                read = await _thrown_away(headers, receive)
                await no.response({} if read else {"connection": "close"})(scope, receive, send)
            return
        scope.setdefault("state", {})["role"] = role
        await self._app(scope, receive if live else self._counting(receive), send)

    def _check_size(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > self._settings.body_bytes:
            raise RequestError(
                413, f"the body is over the limit of {self._settings.body_bytes:,} bytes", "body_too_large"
            )

    def _check_open(self, path: str) -> None:
        if self._stopping() and path != "/health":
            raise RequestError(503, "the service is stopping: ask another one, or later", "stopping", retry_after=5)

    def _counting(self, receive: Receive) -> Receive:
        left = self._settings.body_bytes

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                # The one kind of error that passes through the parsing of a body as it is.
                raise HTTPException(413, f"the body is over the limit of {self._settings.body_bytes:,} bytes")
            return message

        return counted


async def _thrown_away(headers: Headers, receive: Receive) -> bool:
    """Read a small body and forget it: to close on one that is still coming resets the connection, the answer with it.

    Returns:
        Whether nothing of it is left.
    """
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not length.isascii() or not length.isdigit() or int(length) > _SMALL:
        return False
    try:
        async with asyncio.timeout(_PATIENCE):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        return False
    return True
