"""`Link`: requests to one endpoint, with bounded waits, and errors that say what is wrong in one line."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

import httpx

from autoglm_lab import errors
from autoglm_lab.engine.wire import EXTENSION, from_wire
from autoglm_lab.errors import EndpointError, LabError

CONNECT_SECONDS: Final = 5.0
"""Longest wait for a connection."""
_ASK_SECONDS: Final = 60.0
_SHOWN = 300
# What a server of ours refuses is raised as the error that it was there.
_CODES: Final[dict[str, type[LabError]]] = {
    "context_length_exceeded": errors.ContextLimitError,
    "module_off": errors.ModuleError,
    "module_not_moved": errors.ModuleError,
    "invalid_media": errors.MediaError,
    "invalid_messages": errors.MessageError,
    "conversation": errors.ConversationError,
    "conversation_not_found": errors.ConversationError,
    "module_not_found": errors.ModuleError,
    "invalid_setting": errors.PolicyError,
}


# These carry their figures.
_UNFIT: Final[dict[str, Any]] = {"does_not_fit": errors.AdmissionError, "out_of_memory": errors.OutOfMemoryError}


@dataclass(frozen=True)
class _Figures:
    """What did not fit, as an `errors.OutOfMemoryError` has it. Bytes."""

    phase: str
    needed: int | None
    had: int | None
    remedies: tuple[str, ...] = ()


class AdminOnlyError(EndpointError):
    """A server of ours asks for its admin key."""


class Link:
    """One endpoint. Safe from any thread.

    Args:
        url: ``http://127.0.0.1:8000/v1``; scheme and ``/v1`` may be left out.
        api_key: None: the endpoint asks for none. The admin key of a server of ours goes for everything.

    Attributes:
        url: the base of the OpenAI API, ending in ``/v1``.
        root: the server's own base.
        host: for people: ``127.0.0.1:8000``.
        client: sends the requests.

    Raises:
        EndpointError: the URL is none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url, self.root, self.host = _read_url(url)
        self.api_key = api_key or "EMPTY"
        self.trust_env = not _is_here(self.root)  # a proxy of the environment has no business on this machine
        timeout = httpx.Timeout(_ASK_SECONDS, connect=CONNECT_SECONDS)
        self.client = httpx.Client(timeout=timeout, trust_env=self.trust_env)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that ``path``, such as ``/v1/models``, answers with.

        Raises:
            EndpointError: no server, no right, or no JSON; the message says which.
            LabError: what a server of ours refused, as the error that it was there.
        """
        response = self._send(method, path, body)
        if response.is_error:
            raise self.refusal(response.status_code, response.text, f"{method} {path}")
        try:
            return response.json() if response.content else None
        except json.JSONDecodeError:
            kind = response.headers.get("content-type", "no content type")
            raise EndpointError(
                f"{self.host} answered {method} {path} with {kind} instead of JSON: is it an OpenAI-compatible server?"
            ) from None

    def look(self, path: str) -> Any:
        """The JSON, or the text, of ``path``; None where there is none for us."""
        try:
            response = self._send("GET", path, None)
        except EndpointError:
            return None
        if response.is_error:
            return None
        try:
            return response.json()
        except json.JSONDecodeError:
            return response.text

    @contextmanager
    def lines(self, path: str, silence: float) -> Iterator[Iterator[str]]:
        """The lines of an answer that does not end; ``silence`` is the longest wait for one, in seconds."""
        timeout = httpx.Timeout(silence, connect=CONNECT_SECONDS)
        with self.client.stream("GET", self.root + path, headers=self._headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
                raise self.refusal(response.status_code, response.text, f"GET {path}")
            yield response.iter_lines()

    def refusal(self, status: int, text: str, asked: str) -> LabError:
        """The error for an answer with an error status."""
        said, code, more = _said(text)
        ours = self.named(code, said, asked, more)
        if ours is not None:
            return ours
        if status in (401, 403):
            return EndpointError(f"{self.host} refused the key for {asked} ({status}): give the right one as api_key=")
        if status == 404 and not said:
            return EndpointError(f"{self.host} has no {asked}: is {self.url} the base of an OpenAI-compatible API?")
        if status == 429:
            return EndpointError(f"{self.host} is busy and refused {asked} (429): {said or 'try again later'}")
        return EndpointError(f"{self.host} refused {asked} ({status}): {said or 'without a reason'}")

    def named(self, code: str, said: str, asked: str, more: Any = None) -> LabError | None:
        """The error that a server of ours names by its code; None: it names none.

        Args:
            more: the figures that came with it.
        """
        if code == "admin_only":
            return AdminOnlyError(f"{self.host} refused {asked}: {said}")
        if code in _UNFIT and isinstance(more, Mapping):
            with suppress(LabError):
                figures = from_wire(_Figures, more)
                unfit: LabError = _UNFIT[code](figures.phase, figures.needed, figures.had, figures.remedies)
                return unfit
        return _CODES[code](said) if code in _CODES else None

    def unreachable(self, error: BaseException) -> EndpointError:
        """The error for a request that got no answer."""
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return EndpointError(f"there is no server at {self.host}: start it, or check the address ({self.url})")
        if isinstance(error, httpx.TimeoutException):
            return EndpointError(f"{self.host} did not answer in time: it may be loading or overloaded; try again")
        return EndpointError(f"the connection to {self.host} failed: {str(error) or type(error).__name__}")

    def close(self) -> None:
        self.client.close()

    def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        try:
            try:
                return self.client.request(method, self.root + path, json=body, headers=self._headers)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                if method != "GET":
                    raise
                # The server closed a kept connection at the moment that it was used again.
                return self.client.request(method, self.root + path, json=body, headers=self._headers)
        except (httpx.HTTPError, httpx.InvalidURL, RuntimeError) as error:
            raise self.unreachable(error) from None

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}


def in_path(name: str) -> str:
    """A name as one step of a path."""
    return quote(name, safe="")


def _read_url(url: str) -> tuple[str, str, str]:
    given = str(url).strip()
    parts = urlsplit(given if "://" in given else f"http://{given}")
    try:
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine:
        raise EndpointError(f"{given!r} is no endpoint: give a URL such as 'http://127.0.0.1:8000/v1'")
    host = parts.netloc.rpartition("@")[2]
    path = parts.path.rstrip("/")
    path = path if path.endswith("/v1") else f"{path}/v1"
    base = urlunsplit((parts.scheme, host, path, "", ""))
    return base, base.removesuffix("/v1"), host


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _said(text: str) -> tuple[str, str, Any]:
    """What an error's body says, its code, and what a server of ours adds."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        return "", "", None
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(error, Mapping):
        return str(error)[:_SHOWN], "", None
    said = error.get("message") or error.get("detail") or ""
    said = said if isinstance(said, str) else json.dumps(said)
    # Where nothing but "Not Found" is said, nothing is said.
    return ("" if said == "Not Found" else said[:_SHOWN]), str(error.get("code")), error.get(EXTENSION)
