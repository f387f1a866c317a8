"""The app: every endpoint of one service, and how each kind of error is told."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from autoglm_lab.engine.local import LocalEngine
from autoglm_lab.errors import LabError
from autoglm_lab.server import chat, live, memory, responses
from autoglm_lab.server.asking import ClientGoneError
from autoglm_lab.server.dialogues import Dialogues
from autoglm_lab.server.gate import Gate
from autoglm_lab.server.metrics import Metrics
from autoglm_lab.server.places import Places
from autoglm_lab.server.request_error import RequestError
from autoglm_lab.server.service import Planner, Service, service_of
from autoglm_lab.server.settings import ServerSettings


def build_app(engine: LocalEngine, settings: ServerSettings, plan: Planner) -> FastAPI:
    """The app of one engine. It neither starts nor stops the engine.

    Args:
        plan: answers ``POST /v1/memory/plan``.
    """
    places = Places(settings.running, settings.waiting)
    service = Service(
        engine=engine,
        settings=settings,
        plan=plan,
        metrics=Metrics(engine, lambda: (places.running, places.waiting)),
        places=places,
        dialogues=Dialogues(settings.stored_bytes),
    )
    # The pages that show the description load their scripts from elsewhere: they are left out.
    app = FastAPI(title="autoglm-lab", version="1", docs_url=None, redoc_url=None)
    app.state.service = service
    for router in (chat.router, responses.router, memory.router, live.router):
        app.include_router(router)
    _add_status(app)
    app.add_middleware(Gate, settings=settings, stopping=lambda: service.stopping)
    for kind in (LabError, RequestError, RequestValidationError, HTTPException, ClientGoneError, Exception):
        app.add_exception_handler(kind, _told)
    return app


def _add_status(app: FastAPI) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the service is alive."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(request: Request) -> dict[str, str]:
        """Whether it answers: the model is loaded."""
        if service_of(request).engine.closed:
            raise RequestError(503, "the model is closed", "closed", retry_after=5)
        return {"status": "ready"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The names that the model answers to."""
        service = service_of(request)
        return {"object": "list", "data": [_model(service, name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        """One of them."""
        service = service_of(request)
        return _model(service, service.check_model(name))

    @app.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        text = service_of(request).metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(service: Service, name: str) -> dict[str, Any]:
    own = service.names[0]
    return {
        "id": name,
        "object": "model",
        "created": int(service.began),
        "owned_by": "autoglm-lab",
        "root": own,
        "max_model_len": service.engine.capabilities.context_tokens,
    }


async def _told(request: Request, error: Exception) -> Response:
    """Any error in OpenAI's shape, with no word of the inside."""
    metrics = service_of(request).metrics
    if isinstance(error, ClientGoneError):
        return JSONResponse(None, 499)  # nobody reads it
    if isinstance(error, RequestValidationError):
        error = _invalid(error)
    elif isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code, "invalid")
        error = RequestError(error.status_code, str(error.detail), code)
    return metrics.failed(request.url.path[:60], error).response()


def _invalid(error: RequestValidationError) -> RequestError:
    problem = error.errors()[0]
    path = [str(step) for step in problem["loc"] if step not in ("body", "query", "path")]
    where = ".".join(path)[:100]
    message = str(problem["msg"]).removeprefix("Value error, ")
    return RequestError(400, f"{where + ': ' if where else ''}{message}", "invalid_value", param=where or None)
