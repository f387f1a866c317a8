"""The events of a streamed response, each in its place and counted."""

from __future__ import annotations

from typing import Any

from autoglm_lab.server.request_error import RequestError
from autoglm_lab.server.response_items import message_item, reasoning_item, text_part
from autoglm_lab.server.sse import event


class ResponseEvents:
    """Turns the pieces of an answer into the events that clients of OpenAI's responses expect.

    Args:
        response: as it is in the beginning.
    """

    def __init__(self, response: dict[str, Any]) -> None:
        self._response, self._id = response, response["id"]
        self._number = -1
        self._index = -1
        self._open = ""
        self._text = ""

    def begin(self) -> list[bytes]:
        return [self._event(f"response.{name}", response=self._response) for name in ("created", "in_progress")]

    def reasoning(self, piece: str) -> list[bytes]:
        events = self._into("reasoning")
        self._text += piece
        return [*events, self._summary("response.reasoning_summary_text.delta", delta=piece)]

    def text(self, piece: str) -> list[bytes]:
        events = self._into("message")
        self._text += piece
        return [*events, self._part("response.output_text.delta", delta=piece, logprobs=[])]

    def end(self, response: dict[str, Any]) -> list[bytes]:
        """The last events; ``response`` as it is in the end."""
        events = self._into("message") if self._open != "message" else []
        status = "incomplete" if response["status"] == "incomplete" else "completed"
        return [*events, *self._close(status), self._event(f"response.{status}", response=response)]

    def failed(self, told: RequestError) -> bytes:
        error = {"code": told.code, "message": told.message}
        return self._event("response.failed", response={**self._response, "status": "failed", "error": error})

    def _into(self, kind: str) -> list[bytes]:
        """Open the item of a kind, and close the one before."""
        if self._open == kind:
            return []
        events = self._close("completed")
        self._open, self._text = kind, ""
        self._index += 1
        thought = kind == "reasoning"
        item = reasoning_item(self._id, None) if thought else message_item(self._id, None, "in_progress")
        events.append(self._event("response.output_item.added", output_index=self._index, item=item))
        if thought:
            part = {"type": "summary_text", "text": ""}
            events.append(self._summary("response.reasoning_summary_part.added", part=part))
        else:
            events.append(self._part("response.content_part.added", part=text_part("")))
        return events

    def _close(self, status: str) -> list[bytes]:
        text = self._text
        if self._open == "reasoning":
            item, part = reasoning_item(self._id, text), {"type": "summary_text", "text": text}
            events = [
                self._summary("response.reasoning_summary_text.done", text=text),
                self._summary("response.reasoning_summary_part.done", part=part),
            ]
        elif self._open == "message":
            item = message_item(self._id, text, status)
            events = [
                self._part("response.output_text.done", text=text, logprobs=[]),
                self._part("response.content_part.done", part=text_part(text)),
            ]
        else:
            return []
        return [*events, self._event("response.output_item.done", output_index=self._index, item=item)]

    def _summary(self, kind: str, **data: Any) -> bytes:
        item = reasoning_item(self._id, None)["id"]
        return self._event(kind, item_id=item, output_index=self._index, summary_index=0, **data)

    def _part(self, kind: str, **data: Any) -> bytes:
        item = message_item(self._id, None, "")["id"]
        return self._event(kind, item_id=item, output_index=self._index, content_index=0, **data)

    def _event(self, kind: str, **data: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **data}, kind)
