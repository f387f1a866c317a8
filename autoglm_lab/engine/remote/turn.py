"""One turn behind an endpoint: a streamed completion, read into the events of a `Turn`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import httpx
import openai

from autoglm_lab.engine.protocol import (
    Answer,
    FinishReason,
    MemoryEvent,
    ReasoningDelta,
    TextDelta,
    Timings,
    Turn,
    Usage,
)
from autoglm_lab.engine.remote.chat import REASONING, EndpointChat
from autoglm_lab.engine.remote.history import WireMessage
from autoglm_lab.engine.remote.link import Link
from autoglm_lab.engine.remote.thought_tags import ThoughtTags
from autoglm_lab.engine.wire import EXTENSION, from_wire
from autoglm_lab.errors import EndpointError, LabError, WireError
from autoglm_lab.memory.events import Event

_BROKEN = (httpx.HTTPError, TimeoutError, openai.APIConnectionError)


@dataclass
class RemoteTurn:
    """Reads one completion.

    Args:
        turn: gets the events.
        chat: asks; None where a turn is asked in another way.
        link: words errors.

    Attributes:
        new: what this turn adds to the dialogue.
        text, reasoning: what came so far.
        phase: ``prefill`` until the first token, then ``decode``; ``idle`` while a question is being spoken.
        task: that reads; None before it began.
    """

    turn: Turn
    chat: EndpointChat | None
    link: Link
    new: list[WireMessage] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    phase: Literal["idle", "prefill", "decode"] = "prefill"
    task: asyncio.Task[Any] | None = None

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._first: float | None = None
        self._usage = Usage()
        self._finish: str | None = None
        self._whole: Answer | None = None
        self._tags = ThoughtTags()

    async def read(self, messages: Sequence[dict[str, Any]], request: Mapping[str, Any]) -> Answer:
        """Ask, and read until the end.

        Raises:
            EndpointError: it could not be asked, or the stream broke off; what came until then stays with the turn.
            LabError: what a server of ours refused.
        """
        chat = cast("EndpointChat", self.chat)
        try:
            async with aclosing(cast("AsyncGenerator[Any, None]", chat.astream(list(messages), **request))) as chunks:
                async for chunk in chunks:
                    self._take(chunk)
                    if self.turn.cancelled:  # Python 3.11's wait_for may swallow the cancellation itself
                        return self.answer("cancelled")
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APIError as error:
            if isinstance(error, openai.APIConnectionError) and not self._started:
                raise self.link.unreachable(_of_network(error)) from None
            raise self._told(error) or self._broken(error) from None
        except _BROKEN as error:
            raise self._broken(error) from None
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, LabError):
                raise
            raise EndpointError(f"{self.link.host} sent what is no chat completion: {error}") from None
        self._emit(self._tags.finish())
        if self._finish is None:
            raise self._broken(None)
        return self.answer(_reason(self._finish))

    def answer(self, reason: FinishReason) -> Answer:
        """What came so far, as an answer."""
        now = time.monotonic()
        first = None if self._first is None else self._first - self._began
        decoded = self._usage.completion_tokens - 1
        rate = decoded / (now - self._first) if self._first is not None and decoded > 0 and now > self._first else None
        timings = Timings(first, now - self._began, rate)
        told = self._whole or Answer("", "", reason, self._usage, timings)
        return replace(
            told,
            text=self.text,
            reasoning=self.reasoning,
            finish_reason=reason,
            timings=replace(timings, tokens_per_second=told.timings.tokens_per_second or rate),
            conversation=self.turn.conversation,
        )

    @property
    def _started(self) -> bool:
        return self._first is not None

    def _take(self, chunk: Any) -> None:
        self._take_more(chunk.additional_kwargs.get(EXTENSION))
        thought, text = chunk.additional_kwargs.get(REASONING), chunk.content
        if thought:
            self._emit([ReasoningDelta(thought)])
        if isinstance(text, str) and text:
            self._emit(self._tags.feed(text))
        self._finish = chunk.response_metadata.get("finish_reason") or self._finish
        used = chunk.usage_metadata
        if used:
            cached = (used.get("input_token_details") or {}).get("cache_read") or 0
            self._usage = Usage(used["input_tokens"], cached, used["output_tokens"])

    def _take_more(self, more: Any) -> None:
        """What a server of ours adds; what this side cannot read of it is left out."""
        for one in more or ():
            try:
                if "event" in one:
                    self.turn.emit(MemoryEvent(from_wire(Event, one["event"])))
                if "answer" in one:
                    self._whole = from_wire(Answer, one["answer"])
            except WireError:
                continue

    def _emit(self, deltas: Sequence[TextDelta | ReasoningDelta]) -> None:
        for delta in deltas:
            if self._first is None:
                self._first, self.phase = time.monotonic(), "decode"
            if isinstance(delta, TextDelta):
                self.text += delta.text
            else:
                self.reasoning += delta.text
            self.turn.emit(delta)

    def _refusal(self, error: openai.APIStatusError) -> LabError:
        return self.link.refusal(error.status_code, error.response.text, "the question")

    def _told(self, error: openai.APIError) -> LabError | None:
        """What a server says in the middle of a stream."""
        told = error.body if isinstance(error.body, Mapping) else {}
        code, message, more = str(told.get("code")), str(told.get("message")), told.get(EXTENSION)
        return self.link.named(code, message, "the question", more)

    def _broken(self, error: BaseException | None) -> EndpointError:
        seconds = time.monotonic() - self._began
        if isinstance(error, TimeoutError | httpx.TimeoutException | openai.APITimeoutError):
            why = "sent nothing for too long"
        elif error is None:
            why = "ended the stream before the answer was finished"
        else:
            why = f"broke off ({str(error) or type(error).__name__})"
        parts = [f"{len(self.reasoning):,} characters of the thought"] * bool(self.reasoning)
        parts += [f"{len(self.text):,} characters of the answer"] * bool(self.text)
        return EndpointError(
            f"{self.link.host} {why} after {seconds:.1f} s, having sent {' and '.join(parts) or 'nothing'}: ask again"
        )


def _of_network(error: BaseException) -> BaseException:
    """The network's own error behind those that libraries made of it."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, httpx.HTTPError):
        found = found.__cause__ or found.__context__
    return found or error


def _reason(told: str) -> FinishReason:
    known: dict[str, FinishReason] = {"length": "length", "cancelled": "cancelled", "error": "error"}
    return known.get(told, "stop")
