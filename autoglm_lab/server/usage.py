"""The figures of an answer as clients read them: OpenAI's fields, and ours beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoglm_lab.engine.protocol import Answer
from autoglm_lab.engine.wire import to_wire


def usage_of(answer: Answer, read: str = "prompt", written: str = "completion") -> dict[str, Any]:
    """The ``usage`` of an answer.

    Args:
        read, written: what an endpoint calls them: ``prompt`` and ``completion``, or ``input`` and ``output``.
    """
    usage = answer.usage
    return {
        f"{read}_tokens": usage.prompt_tokens,
        f"{written}_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        f"{read}_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.image_tokens,
            "audio_tokens": usage.audio_tokens,
        },
        "kv_bytes": answer.kv_bytes,
        "peak_bytes": max(answer.peak_bytes.values(), default=None),
        "first_token_s": answer.timings.first_token,
    }


def answer_wire(answer: Answer, *, reasoning: bool = True) -> dict[str, Any]:
    """The whole answer for a remote engine of ours; without its thought where that was not wanted."""
    wire: dict[str, Any] = to_wire(answer if reasoning else replace(answer, reasoning=""))
    return wire
