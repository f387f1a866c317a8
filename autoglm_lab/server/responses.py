"""`/v1/responses`: OpenAI's newer endpoint, whose clients see the thought as a reasoning summary."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from autoglm_lab.engine.protocol import Answer, ReasoningDelta, TextDelta, Turn
from autoglm_lab.server.access import check_asked
from autoglm_lab.server.asking import Question, answering, new_id, unless_gone
from autoglm_lab.server.response_events import ResponseEvents
from autoglm_lab.server.response_items import messages_of, output_items
from autoglm_lab.server.sampling import Sampling
from autoglm_lab.server.service import Service, role_in, service_of
from autoglm_lab.server.sse import EventStream
from autoglm_lab.server.usage import usage_of

router = APIRouter()

_Id = Annotated[str, Field(max_length=100)]


class ResponseRequest(Sampling):
    """A response: ``input`` is text, or messages and their parts."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: _Id | None = None
    store: bool | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


@router.post("/v1/responses")
async def create(request: Request, asked: ResponseRequest) -> Response:
    """Answer, whole or as it comes."""
    service, role = service_of(request), role_in(request)
    name, thinks = service.check_model(asked.model), service.engine.capabilities.thinking
    check_asked(service.settings, role, conversation=asked.conversation, force=asked.force)
    effort = (asked.reasoning or {}).get("effort")
    if effort is not None and asked.reasoning_effort is None:
        asked.reasoning_effort = str(effort)
    options = asked.generation(can_think=thinks)
    before: list[dict[str, Any]] = []
    if asked.previous_response_id is not None:
        before = service.dialogues.get(asked.previous_response_id, role, "previous_response_id").messages
    # As OpenAI has it, instructions count for one response and are not handed on.
    said = [*before, *messages_of(asked.input)]
    told = [] if asked.instructions is None else [{"role": "system", "content": asked.instructions}]
    question = Question([*told, *said], options, asked.conversation, asked.replace, asked.force)
    turn = await unless_gone(request, answering(service, question))
    response = _Response(service, turn, name, asked, said, role)
    ignored = asked.ignored(can_think=thinks)
    headers = {"x-autoglm-ignored": ignored} if ignored else {}
    try:
        if asked.stream:
            return EventStream(response.events(), headers, closed=turn.cancel)
        answer = await unless_gone(request, _finished(turn))
    except BaseException:
        turn.cancel()
        raise
    return JSONResponse(response.done(answer), headers=headers)


@router.get("/v1/responses/{name}")
async def retrieve(request: Request, name: _Id) -> dict[str, Any]:
    """A response that is kept."""
    return service_of(request).dialogues.get(name, role_in(request), "id").response


@router.delete("/v1/responses/{name}")
async def delete(request: Request, name: _Id) -> dict[str, Any]:
    """Forget a response and the dialogue up to it."""
    service_of(request).dialogues.drop(name, role_in(request))
    return {"id": name, "object": "response.deleted", "deleted": True}


async def _finished(turn: Turn) -> Answer:
    return await turn


class _Response:
    """One turn in the words of a response."""

    def __init__(
        self, service: Service, turn: Turn, model: str, asked: ResponseRequest, said: list[dict[str, Any]], role: Any
    ) -> None:
        self._service, self._turn, self._asked, self._said, self._role = service, turn, asked, said, role
        self._head: dict[str, Any] = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": asked.previous_response_id,
            "temperature": asked.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": asked.top_p,
        }

    def done(self, answer: Answer) -> dict[str, Any]:
        """The finished response; kept for the next one unless ``store`` is false."""
        reasoning = answer.reasoning if self._asked.return_reasoning else ""
        cut = answer.finish_reason == "length"
        response = {
            **self._head,
            "status": "incomplete" if cut else "cancelled" if answer.finish_reason == "cancelled" else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output_items(self._head["id"], reasoning, answer.text, "incomplete" if cut else "completed"),
            "usage": usage_of(answer, "input", "output"),
        }
        self._service.metrics.answered("responses", answer)
        if self._asked.store is not False:
            spoken = {"role": "assistant", "content": answer.text}
            self._service.dialogues.keep(response, [*self._said, spoken], self._role)
        return response

    async def events(self) -> AsyncIterator[bytes]:
        told = ResponseEvents({**self._head, "status": "in_progress", "output": [], "usage": None})
        for one in told.begin():
            yield one
        try:
            async for piece in self._turn:
                if isinstance(piece, TextDelta):
                    for one in told.text(piece.text):
                        yield one
                elif isinstance(piece, ReasoningDelta):
                    if self._asked.return_reasoning:
                        for one in told.reasoning(piece.text):
                            yield one
                elif isinstance(piece, Answer):
                    for one in told.end(self.done(piece)):
                        yield one
        except Exception as error:  # noqa: BLE001 - the answer has begun: its client is told in the stream
            yield told.failed(self._service.metrics.failed("responses", error))
