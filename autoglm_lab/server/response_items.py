"""The items of a response: messages out of its input, and its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoglm_lab.server.request_error import RequestError


def messages_of(given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input as messages of a chat completion. Thoughts of earlier answers are left out.

    Raises:
        RequestError: an item of a kind that this service does not know.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages = []
    for item in given:
        kind = item.get("type", "message")
        if kind == "reasoning":
            continue
        if kind != "message":
            raise RequestError(
                400, f"unknown input item {str(kind)[:40]!r}: use message", "invalid_value", param="input"
            )
        content = item.get("content")
        parts = [_part(part) for part in content] if isinstance(content, list) else content
        messages.append({"role": item.get("role"), "content": parts})
    return messages


def output_items(response: str, reasoning: str, text: str, status: str) -> list[dict[str, Any]]:
    """The thought, where there is one, and the answer."""
    items = [reasoning_item(response, reasoning)] if reasoning else []
    return [*items, message_item(response, text, status)]


def reasoning_item(response: str, text: str | None) -> dict[str, Any]:
    """The thought; ``text`` None: it is only beginning."""
    summary = [] if text is None else [{"type": "summary_text", "text": text}]
    return {"id": response.replace("resp-", "rs-", 1), "type": "reasoning", "summary": summary}


def message_item(response: str, text: str | None, status: str) -> dict[str, Any]:
    """The answer; ``text`` None: it is only beginning."""
    return {
        "id": response.replace("resp-", "msg-", 1),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [] if text is None else [text_part(text)],
    }


def text_part(text: str) -> dict[str, Any]:
    """A piece of an answer."""
    return {"type": "output_text", "text": text, "annotations": []}


def _part(part: Any) -> Any:
    """A part of a message, as a chat completion has it; what is unknown is refused where the media are read."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text", "summary_text"):
        return {"type": "text", "text": part.get("text")}
    if kind == "input_image":
        return {"type": "image_url", "image_url": part.get("image_url")}
    return part
