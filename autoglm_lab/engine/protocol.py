"""What an engine can do, and what a turn of a conversation looks like from outside.

`LocalEngine` and a remote engine satisfy the same `Engine` protocol, so the dashboard and the notebooks do not know
which one they hold.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from autoglm_lab.engine.messages import Message
from autoglm_lab.errors import ConversationError
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.memory.residency.module_info import ModuleInfo
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import format_bytes, format_seconds

__all__ = [
    "Answer",
    "Capabilities",
    "ConversationInfo",
    "Engine",
    "FinishReason",
    "MemoryEvent",
    "ModuleInfo",
    "ReasoningDelta",
    "TextDelta",
    "Timings",
    "Turn",
    "TurnEvent",
    "TurnListener",
    "Usage",
]

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """A piece of the thought before the answer."""

    text: str


@dataclass(frozen=True)
class MemoryEvent:
    """Something that happened to the memory for this turn."""

    event: Event


@dataclass(frozen=True)
class Usage:
    """Tokens of one turn. ``prompt_tokens`` counts the whole prompt, ``cached_tokens`` the part that was reused."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds. ``first_token`` counts from submission; ``tokens_per_second`` covers decoding alone."""

    first_token: float | None = None
    total: float = 0.0
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Answer:
    """A finished turn: also its last event.

    Attributes:
        text: the answer, without the thought and its tags.
        reasoning: the thought; empty where there was none.
        finish_reason: ``stop``, ``length``, ``cancelled`` or ``error``.
        peak_bytes: by phase, the most bytes the process held on the device, as far as the machine tells.
        work_bytes: by phase, the most bytes it held beyond what stood when the phase began: activations, and what
            stayed of them.
        kv_bytes: of the conversation's keys and values when the turn ended; None where the engine does not tell.
    """

    text: str
    reasoning: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    peak_bytes: dict[str, int] = field(default_factory=dict)
    conversation: str = "main"
    work_bytes: dict[str, int] = field(default_factory=dict)
    kv_bytes: int | None = None

    @property
    def figures(self) -> str:
        """The figures of this answer in one line."""
        usage, timings = self.usage, self.timings
        parts = []
        if timings.first_token is not None:
            parts.append(f"first token {format_seconds(timings.first_token)}")
        if timings.tokens_per_second is not None:
            parts.append(f"{timings.tokens_per_second:.0f} tok/s")
        media = [f"{usage.image_tokens:,} image"] * bool(usage.image_tokens)
        media += [f"{usage.audio_tokens:,} audio"] * bool(usage.audio_tokens)
        text_tokens = usage.prompt_tokens - usage.image_tokens - usage.audio_tokens
        parts.append(" + ".join([*media, f"{text_tokens:,} text"]) + f" tokens, {usage.cached_tokens:,} reused")
        if self.peak_bytes:
            parts.append(f"peak {format_bytes(max(self.peak_bytes.values()))}")
        return " · ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return self.text

    def _ipython_display_(self) -> None:
        """Show the answer and its figures, unless they have just streamed into this very cell."""
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        shell = get_ipython()
        if shell is None or getattr(self, "_shown_in", None) != shell.execution_count:
            display({"text/plain": f"{self.text}\n{self.figures}"}, raw=True)  # type: ignore[no-untyped-call]


TurnEvent = TextDelta | ReasoningDelta | MemoryEvent | Answer


class Turn:
    """One turn under way: its events so far, and the means to wait for more, to add sound, or to stop it.

    Iterate it (``for`` or ``async for``) for events, ``await`` it or call `result` for the `Answer`. Several readers
    each see every event from the start. All methods may be called from any thread.
    """

    def __init__(
        self,
        conversation: str,
        *,
        cancel: Callable[[Turn], None],
        feed: Callable[[Turn, Any], None] | None = None,
        ask: Callable[[Turn, str | None], None] | None = None,
    ) -> None:
        self.conversation = conversation
        self.cancelled = False
        self.run: Any = None
        self.presenter: Callable[[Turn], Coroutine[Any, Any, None]] | None = None
        self._cancel, self._feed, self._ask = cancel, feed, ask
        self._events: list[TurnEvent] = []
        self._error: BaseException | None = None
        self._finished = False
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    # what the engine calls

    def emit(self, event: TurnEvent) -> None:
        """Add an event; an `Answer` finishes the turn."""
        with self._changed:
            self._events.append(event)
            self._finished = self._finished or isinstance(event, Answer)
            self._changed.notify_all()
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    def fail(self, error: BaseException) -> None:
        """Finish the turn with an error, which every reader sees raised."""
        with self._changed:
            self._error, self._finished = error, True
            self._changed.notify_all()
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    # what people call

    @property
    def done(self) -> bool:
        return self._finished

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(event.text for event in tuple(self._events) if isinstance(event, TextDelta))

    @property
    def reasoning(self) -> str:
        """The thought so far."""
        return "".join(event.text for event in tuple(self._events) if isinstance(event, ReasoningDelta))

    @property
    def error(self) -> BaseException | None:
        return self._error

    def cancel(self) -> None:
        """Stop after the current step. What was answered so far stays, with finish reason ``cancelled``."""
        if not self._finished:
            self.cancelled = True
            self._cancel(self)

    def feed(self, pcm: Any) -> None:
        """Add live sound before the question is closed.

        Args:
            pcm: float samples in -1..1, 16 kHz mono, ``[samples]``, any packet size.
        """
        if self._feed is None or self._finished:
            raise ConversationError("this turn takes no live sound: start one with wb.chat(..., live=True)")
        self._feed(self, pcm)

    def ask(self, text: str | None = None) -> Turn:
        """Close the live sound and start the answer; ``text`` is added to the question."""
        if self._ask is None or self._finished:
            raise ConversationError(
                "this turn was already asked: only wb.chat(..., live=True) leaves the question open"
            )
        self._ask(self, text)
        return self

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` (from the engine's thread, without arguments) after every new event."""
        with self._changed:
            self._listeners.append(listener)
            late = bool(self._events) or self._finished
        if late:
            listener()

    def __iter__(self) -> Iterator[TurnEvent]:
        seen = 0
        while True:
            with self._changed:
                while len(self._events) <= seen and not self._finished:
                    self._changed.wait()
                events, finished, error = self._events[seen:], self._finished, self._error
            yield from events
            seen += len(events)
            if finished and seen >= len(self._events):
                if error is not None:
                    raise error
                return

    async def __aiter__(self) -> AsyncIterator[TurnEvent]:
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        self.on_change(lambda: _tell(loop, changed))
        seen = 0
        while True:
            with self._changed:
                events, finished, error = self._events[seen:], self._finished, self._error
            for event in events:
                yield event
            seen += len(events)
            if finished and seen >= len(self._events):
                if error is not None:
                    raise error
                return
            await changed.wait()
            changed.clear()

    def __await__(self) -> Generator[Any, None, Answer]:
        return self._finish().__await__()

    async def _finish(self) -> Answer:
        if self.presenter is not None:
            await self.presenter(self)
        async for _ in self:
            pass
        return self.result(0)

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the answer.

        Args:
            timeout: seconds; None waits without end.

        Raises:
            TimeoutError: not finished in time; the turn goes on.
            LabError: what the turn failed with.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._changed.wait_for(lambda: self._finished, left):
                raise TimeoutError(f"the turn is not finished after {timeout} s; it goes on, cancel() stops it")
            if self._error is not None:
                raise self._error
            answer = self._events[-1]
        assert isinstance(answer, Answer)
        return answer


TurnListener = Callable[[Turn, tuple[Message, ...]], None]
"""Is told of a turn that was submitted, with the messages that are new in it."""


def _tell(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(changed.set)


@dataclass(frozen=True)
class ConversationInfo:
    """A conversation as the dashboard lists it.

    Attributes:
        kv_bytes: on the device; None: an endpoint does not tell.
        busy: a turn of it runs.
    """

    name: str
    turns: int
    tokens: int
    kv_bytes: int | None
    busy: bool
    reused_share: float | None = None


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do; what it cannot shows as not available.

    Attributes:
        memory_control: whether its memory can be read and set.
        server: what is behind the endpoint, such as ``vLLM``; empty where the model is in this process.
    """

    model: str
    where: str
    device: str
    dtype: str
    modalities: tuple[str, ...]
    thinking: bool
    memory_control: bool
    context_tokens: int | None
    server: str = ""


class Engine(Protocol):
    """What answers a conversation: in this process, or behind an endpoint."""

    @property
    def policy(self) -> MemoryPolicy: ...
    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def phase(self) -> str: ...
    @property
    def tokens_per_second(self) -> float | None: ...
    @property
    def closed(self) -> bool: ...

    def submit(self, messages: Sequence[dict[str, Any]], *, conversation: str = "main", **options: Any) -> Turn: ...
    def on_turn(self, listener: TurnListener) -> None: ...
    def off_turn(self, listener: TurnListener) -> None: ...
    def set_policy(self, policy: MemoryPolicy) -> None: ...
    def ledger(self) -> Ledger: ...
    def ledgers(self) -> tuple[Ledger, ...]: ...
    def modules(self) -> tuple[ModuleInfo, ...]: ...
    def conversations(self) -> tuple[ConversationInfo, ...]: ...
    def drop(self, conversation: str) -> None: ...
    def park(self, module: str, place: Literal["auto", "host", "disk"] = "auto") -> Move: ...
    def wake(self, module: str) -> Move: ...
    def reclaim(self) -> Event: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
