"""What a request is answered with when it is not done: OpenAI's shape, a status, and no word of the inside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from autoglm_lab.engine.wire import EXTENSION
from autoglm_lab.errors import (
    AdmissionError,
    ContextLimitError,
    ConversationError,
    EngineClosedError,
    LabError,
    MediaError,
    MessageError,
    ModuleError,
    ModuleOffError,
    OutOfMemoryError,
    PolicyError,
    RankError,
)

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_WAIT = 5.0
_STATUS: tuple[tuple[type[LabError], int, str], ...] = (
    (ContextLimitError, 400, "context_length_exceeded"),
    (AdmissionError, 400, "does_not_fit"),
    (OutOfMemoryError, 503, "out_of_memory"),
    (ModuleOffError, 409, "module_off"),
    (ModuleError, 409, "module_not_moved"),
    (MediaError, 400, "invalid_media"),
    (MessageError, 400, "invalid_messages"),
    (ConversationError, 409, "conversation"),
    (EngineClosedError, 503, "closed"),
    (PolicyError, 400, "invalid_setting"),
    (RankError, 503, "rank_failed"),
)


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what was asked, what there is, what to do.
        code: a word that a program can tell errors apart by.
        param: the field of the request that is meant.
        more: what a program of ours reads beside the message, under `EXTENSION`.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after, self.more = retry_after, more

    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error if self.more is None else {**error, EXTENSION: dict(self.more)}}

    def headers(self) -> dict[str, str]:
        given: dict[str, str] = {}
        if self.retry_after is not None:
            given["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 413:
            given["connection"] = "close"  # nobody reads the rest
        if self.status == 401:
            given["www-authenticate"] = "Bearer"
        return given

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body(), self.status, {**self.headers(), **(headers or {})})


def request_error(error: BaseException) -> RequestError:
    """What a client is told of an error. What the package did not raise on purpose stays inside."""
    if isinstance(error, RequestError):
        return error
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            wait = _WAIT if status == 503 else None
            return RequestError(status, str(error), code, retry_after=wait, more=_figures(error))
    if isinstance(error, LabError):
        return RequestError(400, str(error), "invalid_request")
    return RequestError(500, "the service failed on this request; its log says why", "internal")


def _figures(error: BaseException) -> dict[str, Any] | None:
    """The figures of what did not fit, so that the other side can raise the same error."""
    if not isinstance(error, OutOfMemoryError):
        return None
    return {"phase": error.phase, "needed": error.needed, "had": error.had, "remedies": list(error.remedies)}
