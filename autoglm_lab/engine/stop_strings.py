"""Texts that end an answer: found across the pieces that it comes in, and left out."""

from __future__ import annotations

from collections.abc import Sequence

from autoglm_lab.engine.protocol import ReasoningDelta, TextDelta


class StopStrings:
    """Lets the pieces of an answer pass up to the first stop string. The thought is not looked at.

    Args:
        stops: the texts; none: everything passes at once.

    Attributes:
        text: the answer that has passed.
        found: whether a stop string has come; nothing passes any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.text = ""
        self.found = False

    def feed(self, deltas: Sequence[TextDelta | ReasoningDelta]) -> list[TextDelta | ReasoningDelta]:
        """What can be shown: all but an end that may be the beginning of a stop string."""
        shown: list[TextDelta | ReasoningDelta] = []
        for delta in deltas:
            if isinstance(delta, ReasoningDelta):
                shown.append(delta)
            elif not self.found:
                self._held += delta.text
                shown += self._pass(self._certain())
        return shown

    def finish(self) -> list[TextDelta | ReasoningDelta]:
        """What was held back when the answer has ended without a stop string."""
        return [] if self.found else self._pass(len(self._held))

    def _certain(self) -> int:
        """How many characters of what is held cannot be part of a stop string."""
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return min(starts)
        return len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)

    def _pass(self, length: int) -> list[TextDelta | ReasoningDelta]:
        piece, self._held = self._held[:length], self._held[length:]
        self.text += piece
        return [TextDelta(piece)] if piece else []


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that ``stop`` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
