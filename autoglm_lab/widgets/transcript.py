"""What was said in the conversations of a workbench, as the chat shows it. All its dashboards share one transcript."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autoglm_lab.engine.messages import Message
from autoglm_lab.engine.protocol import Answer, Engine, MemoryEvent, Turn
from autoglm_lab.widgets.attachments import cards_of
from autoglm_lab.widgets.snapshot import Bench

MOST_MESSAGES = 200
"""Messages kept a conversation; the oldest go first."""
MOST_CONVERSATIONS = 50
"""Conversations kept; code may begin any number of them."""
_LIVE = {"kind": "audio", "name": "live", "nbytes": 0}

_transcripts: weakref.WeakKeyDictionary[Bench, Transcript] = weakref.WeakKeyDictionary()
_opening = threading.Lock()


def transcript_of(bench: Bench) -> Transcript:
    """The transcript of a workbench; begun if there is none."""
    with _opening:
        if bench not in _transcripts:
            _transcripts[bench] = Transcript()
        return _transcripts[bench]


class Reply:
    """An answer under way, and when its thought began and ended."""

    def __init__(self, key: int, turn: Turn) -> None:
        self.key, self.turn = key, turn
        self._began = self._ended = 0.0

    def watch(self) -> None:
        """Note the times of the thought; called at every event of the turn."""
        if not self._began and self.turn.reasoning:
            self._began = time.monotonic()
        if self._began and not self._ended and (self.turn.text or self.turn.done):
            self._ended = time.monotonic()

    def card(self) -> dict[str, Any]:
        """As the chat shows it, finished or not."""
        turn = self.turn
        done = turn.done
        card: dict[str, Any] = {
            "id": self.key,
            "role": "assistant",
            "text": turn.text,
            "reasoning": turn.reasoning,
            "thought_seconds": self._ended - self._began if self._ended else None,
            "running": not done,
        }
        if not done:
            return card
        if turn.error is not None:
            return card | {"error": str(turn.error) or type(turn.error).__name__}
        answer = turn.result(0)
        events = [str(event.event) for event in turn if isinstance(event, MemoryEvent)]
        return card | {"text": answer.text, "reasoning": answer.reasoning, "figures": figures(answer), "events": events}


def figures(answer: Answer) -> dict[str, Any]:
    """The figures of an answer, which the browser puts into words: seconds, tokens and bytes."""
    usage, timings = answer.usage, answer.timings
    return {
        "finish": answer.finish_reason,
        "first_token": timings.first_token,
        "seconds": timings.total,
        "rate": timings.tokens_per_second,
        "text_tokens": usage.prompt_tokens - usage.image_tokens - usage.audio_tokens,
        "image_tokens": usage.image_tokens,
        "audio_tokens": usage.audio_tokens,
        "cached_tokens": usage.cached_tokens,
        "new_tokens": usage.completion_tokens,
        "peak": max(answer.peak_bytes.values(), default=None),
        "phases": [
            {"phase": phase, "work": answer.work_bytes[phase], "peak": answer.peak_bytes.get(phase)}
            for phase in ("load", "encode", "prefill", "decode")
            if answer.work_bytes.get(phase, 0) > 0
        ],
    }


class Transcript:
    """Messages by conversation. Safe from any thread; `version` changes whenever a finished message does.

    While a dashboard follows the engine, turns that code submits are heard too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: dict[str, list[dict[str, Any]]] = {}
        self._replies: dict[str, list[Reply]] = {}
        self._heard: list[tuple[Turn, tuple[Message, ...]]] = []
        self._followers: list[Callable[[], None]] = []
        self._here = threading.local()
        self._next = 0
        self.version = 0

    def follow(self, engine: Engine, wake: Callable[[], None]) -> None:
        """Hear the turns of ``engine`` from now on; ``wake`` is called when there is something to `settle`."""
        with self._lock:
            self._followers.append(wake)
            first = len(self._followers) == 1
        if first:
            engine.on_turn(self._hear)

    def leave(self, engine: Engine, wake: Callable[[], None]) -> None:
        """End what `follow` began."""
        with self._lock:
            self._followers.remove(wake)
            last = not self._followers
        if last:
            engine.off_turn(self._hear)

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Turns that this thread submits meanwhile are not heard: it adds them itself."""
        self._here.speaking = True
        try:
            yield
        finally:
            self._here.speaking = False

    def _hear(self, turn: Turn, messages: tuple[Message, ...]) -> None:
        if not getattr(self._here, "speaking", False):
            with self._lock:
                self._heard.append((turn, messages))
            self._changed()

    def _changed(self) -> None:
        for wake in tuple(self._followers):
            wake()

    def ask(self, conversation: str, text: str, cards: list[dict[str, Any]]) -> None:
        """Add what the person said."""
        self._add(conversation, {"role": "user", "text": text, "attachments": cards})

    def refuse(self, conversation: str, error: str) -> None:
        """Add an error in place of an answer."""
        self._add(conversation, {"role": "assistant", "text": "", "reasoning": "", "error": error})

    def answer(self, conversation: str, turn: Turn, on_change: Callable[[], None]) -> None:
        """Add an answer under way; ``on_change`` is called at each of its events, from the engine's thread."""
        with self._lock:
            self._next += 1
            reply = Reply(self._next, turn)
            self._replies.setdefault(conversation, []).append(reply)

        def changed() -> None:
            reply.watch()
            on_change()

        turn.on_change(changed)

    def settle(self) -> None:
        """Add what was heard, and move answers that are finished to the messages. Called by a refresher."""
        with self._lock:
            heard, self._heard = self._heard, []
        for turn, messages in heard:
            asked = [message for message in messages if message.role == "user"][-1:]
            for message in asked:
                self.ask(turn.conversation, message.text, cards_of(message))
            if not asked:
                self.ask(turn.conversation, "", [_LIVE])
            self.answer(turn.conversation, turn, self._changed)
        with self._lock:
            for oldest in list(self._messages)[: max(0, len(self._messages) - MOST_CONVERSATIONS)]:
                if not self._replies.get(oldest):
                    self._replies.pop(oldest, None)
                    del self._messages[oldest]
            for conversation, replies in self._replies.items():
                while replies and replies[0].turn.done:
                    self._append(conversation, replies.pop(0).card())

    def messages(self, conversation: str) -> list[dict[str, Any]]:
        """Finished messages, oldest first."""
        with self._lock:
            return list(self._messages.get(conversation, ()))

    def running(self, conversation: str) -> Reply | None:
        """The answer under way, None where there is none."""
        with self._lock:
            return next(iter(self._replies.get(conversation, ())), None)

    def any_running(self) -> bool:
        with self._lock:
            return any(self._replies.values())

    def conversations(self) -> list[str]:
        """Names of the conversations in which something was said, oldest first."""
        with self._lock:
            return list(dict.fromkeys([*self._messages, *self._replies]))

    def _add(self, conversation: str, message: dict[str, Any]) -> None:
        with self._lock:
            self._next += 1
            self._append(conversation, {"id": self._next} | message)

    def _append(self, conversation: str, message: dict[str, Any]) -> None:
        messages = self._messages.setdefault(conversation, [])
        messages.append(message)
        del messages[:-MOST_MESSAGES]
        self.version += 1
