"""`POST /v1/chat/completions`, as OpenAI has it, with a thought beside the answer and what the memory did."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from autoglm_lab.engine.protocol import Answer, MemoryEvent, ReasoningDelta, TextDelta, Turn
from autoglm_lab.engine.wire import EXTENSION, to_wire
from autoglm_lab.server.access import check_asked
from autoglm_lab.server.asking import Question, answering, new_id, unless_gone
from autoglm_lab.server.sampling import Sampling
from autoglm_lab.server.service import Service, role_in, service_of
from autoglm_lab.server.sse import EventStream, event
from autoglm_lab.server.usage import answer_wire, usage_of

router = APIRouter()


class ChatMessage(BaseModel):
    """A message: text, or parts of type ``text``, ``image_url`` and ``input_audio``."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(max_length=20)
    content: str | list[dict[str, Any]] | None = None


class StreamOptions(BaseModel):
    """``include_usage``: the usage in a chunk of its own; else it comes with the last piece of the answer."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool = False


class ChatRequest(Sampling):
    """A chat completion."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    stream_options: StreamOptions | None = None


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, asked: ChatRequest) -> Response:
    """Answer a dialogue, whole or as it comes."""
    service = service_of(request)
    name, thinks = service.check_model(asked.model), service.engine.capabilities.thinking
    check_asked(service.settings, role_in(request), conversation=asked.conversation, force=asked.force)
    options = asked.generation(can_think=thinks)
    messages = [message.model_dump() for message in asked.messages]
    question = Question(messages, options, asked.conversation, asked.replace, asked.force)
    ignored = asked.ignored(can_think=thinks)
    headers = {"x-autoglm-ignored": ignored} if ignored else {}
    turn = await unless_gone(request, answering(service, question))
    completion = _Completion(service, turn, name, asked)
    try:
        if asked.stream:
            return EventStream(completion.chunks(), headers, closed=turn.cancel)
        answer = await unless_gone(request, _finished(turn))
    except BaseException:
        turn.cancel()
        raise
    return JSONResponse(completion.whole(answer), headers=headers)


async def _finished(turn: Turn) -> Answer:
    return await turn


class _Completion:
    """One turn in the words of a chat completion."""

    def __init__(self, service: Service, turn: Turn, model: str, asked: ChatRequest) -> None:
        self._service, self._turn, self._asked = service, turn, asked
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if self._asked.return_reasoning and answer.reasoning:
            message |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        self._service.metrics.answered("chat", answer)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage_of(answer),
            EXTENSION: {"answer": answer_wire(answer, reasoning=self._asked.return_reasoning)},
        }

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for one in self._turn:
                if isinstance(one, TextDelta):
                    yield self._chunk({"content": one.text})
                elif isinstance(one, ReasoningDelta):
                    if self._asked.return_reasoning:
                        yield self._chunk({"reasoning_content": one.text, "reasoning": one.text})
                elif isinstance(one, MemoryEvent):
                    yield self._chunk({}, ours={"event": to_wire(one.event)})
                else:
                    for last in self._last(one):
                        yield last
        except Exception as error:  # noqa: BLE001 - the answer has begun: its client is told in the stream
            yield event(self._service.metrics.failed("chat", error).body())
        yield event("[DONE]")

    def _last(self, answer: Answer) -> list[bytes]:
        self._service.metrics.answered("chat", answer)
        ours = {"answer": answer_wire(answer, reasoning=self._asked.return_reasoning)}
        apart = self._asked.stream_options is not None and self._asked.stream_options.include_usage
        usage = usage_of(answer)
        last = [self._chunk({}, finish=answer.finish_reason, usage=None if apart else usage, ours=ours)]
        if apart:
            last.append(event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}))
        return last

    def _chunk(self, delta: dict[str, Any], *, finish: str | None = None, usage: Any = None, ours: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if usage is not None:
            chunk["usage"] = usage
        if ours is not None:
            chunk[EXTENSION] = ours
        return event(chunk)
