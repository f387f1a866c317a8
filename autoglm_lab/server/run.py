"""Uvicorn around an app: in the foreground until it is told to stop, or beside a notebook."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from types import FrameType
from typing import Self

import uvicorn
from fastapi import FastAPI

from autoglm_lab.errors import LabError
from autoglm_lab.server.service import Service

_START_SECONDS = 30.0
_AFTER_DRAIN = 5.0
# Longer than clients keep an idle connection (httpx: 5 s): who closes first must not be the one who may be asked.
_KEEP_ALIVE = 75


class Serving:
    """A service that listens. ``with`` stops it in the end.

    Args:
        app: from `build_app`. Its settings say where it listens.

    Attributes:
        url: the base for OpenAI's clients, ending in ``/v1``.

    Raises:
        LabError: the address cannot be had.
    """

    def __init__(self, app: FastAPI) -> None:
        self._service: Service = app.state.service
        settings = self._service.settings
        self._socket = _bound(settings.host, settings.port)
        host, port = self._socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{port}/v1"
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE,
            ws_max_size=settings.body_bytes,
            ws="websockets-sansio",
            timeout_graceful_shutdown=round(settings.drain_seconds + _AFTER_DRAIN),
        )
        self._server = _Server(config, self._service)
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until the process is told to stop (SIGTERM, Ctrl-C); answers under way are finished first."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def start(self) -> Self:
        """Serve on a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="autoglm-lab server", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise LabError(f"serve: the service at {self.url} did not start; the log says why")
            time.sleep(0.005)
        return self

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Begin nothing new, finish the answers under way within ``drain_seconds``, and close. Again is no harm."""
        self._server.leave()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "" if self.running else " (stopped)"
        return f"{self._service.names[0]} at {self.url}{state}"


class _Server(uvicorn.Server):
    """Uvicorn's server, which tells the service first that it stops, and cancels what has not ended in time."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def leave(self) -> None:
        self._service.stopping = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what signal.signal calls
        # Uvicorn's own would raise the signal once more in the end, and nothing after it would be done.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.leave()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stopping = True
        cut = asyncio.ensure_future(self._cut())
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    async def _cut(self) -> None:
        await asyncio.sleep(self._service.settings.drain_seconds)
        logging.getLogger("autoglm_lab.server").warning("stopping the answers that are still under way")
        with contextlib.suppress(LabError):
            self._service.engine.stop()


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sends small pieces at once only where the protocol is said; else each waits 40 ms for an answer.
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise LabError(f"serve: there is no address {host!r}: {error.strerror}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise LabError(f"serve: cannot listen at {host}:{port} ({error.strerror}): choose another --port") from None
    return listening
