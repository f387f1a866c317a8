"""`ThoughtTags`: takes the tags of the AutoGLM format out of text that a server sends as it is."""

from __future__ import annotations

from autoglm_lab.engine.protocol import ReasoningDelta, TextDelta

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class ThoughtTags:
    """Reads ``<think>…</think><answer>…</answer>`` piece by piece; a tag may come in several pieces."""

    def __init__(self) -> None:
        self._held = ""
        self._thinking = False

    def feed(self, text: str) -> list[TextDelta | ReasoningDelta]:
        """What ``text`` completes."""
        self._held += text
        deltas: list[TextDelta | ReasoningDelta] = []
        while True:
            at, tag = min(((at, tag) for tag in _TAGS if (at := self._held.find(tag)) >= 0), default=(-1, ""))
            if at < 0:
                break
            deltas += self._say(self._held[:at])
            self._held = self._held[at + len(tag) :]
            self._thinking = tag == "<think>"
        keep = _half_tag(self._held)
        deltas += self._say(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return deltas

    def finish(self) -> list[TextDelta | ReasoningDelta]:
        """What is left at the end."""
        rest, self._held = self._held, ""
        return self._say(rest)

    def _say(self, text: str) -> list[TextDelta | ReasoningDelta]:
        if not text:
            return []
        return [ReasoningDelta(text) if self._thinking else TextDelta(text)]


def _half_tag(text: str) -> int:
    """Characters at the end that may be the beginning of a tag."""
    return next(
        (size for size in range(min(len(text), 8), 0, -1) if any(tag.startswith(text[-size:]) for tag in _TAGS)), 0
    )
