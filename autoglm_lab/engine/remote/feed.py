"""`Feed`: samples and events of a server of ours, as they happen."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import httpx

from autoglm_lab.engine.remote.link import Link
from autoglm_lab.engine.wire import from_wire
from autoglm_lab.errors import LabError
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger

PATH: Final = "/v1/memory/events"
RATE: Final = 5
"""Samples a second."""
_SILENCE = 15.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0


class Feed:
    """A thread that reads the stream of events, and opens it again when it breaks.

    Args:
        on_sample, on_event: called from this thread.
    """

    def __init__(self, link: Link, on_sample: Callable[[Ledger], None], on_event: Callable[[Event], None]) -> None:
        self._link, self._on_sample, self._on_event = link, on_sample, on_event
        self._stop = threading.Event()
        self._told = -1.0
        self._lost = False
        self._thread = threading.Thread(target=self._run, name="autoglm-lab feed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End soon: at the next thing that the server sends. Does not wait."""
        self._stop.set()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            try:
                with self._link.lines(f"{PATH}?rate={RATE}&since={self._told}", _SILENCE) as lines:
                    for kind, data in server_sent(lines):
                        if self._stop.is_set():
                            return
                        pause, self._lost = _FIRST_PAUSE, False
                        self._take(kind, data)
                why = "the server ended it"
            except (httpx.HTTPError, LabError, RuntimeError) as error:
                why = str(error) or type(error).__name__
            if self._stop.is_set():
                return
            self._note_loss(why)
            self._stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _take(self, kind: str, data: str) -> None:
        try:
            parsed = json.loads(data)
            if kind == "sample":
                self._on_sample(from_wire(Ledger, parsed))
            elif kind == "event":
                event = from_wire(Event, parsed)
                # A stream that is opened again begins with what was told before.
                if event.time > self._told:
                    self._told = event.time
                    self._on_event(event)
        except (json.JSONDecodeError, LabError) as error:
            self._note_loss(f"it sent what is no {kind}: {error}")

    def _note_loss(self, why: str) -> None:
        if not self._lost:
            self._lost = True
            self._on_event(Event(time.time(), "note", f"events of {self._link.host}", why=why))


def server_sent(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name and data of each event of a ``text/event-stream``; comments are left out."""
    kind = "message"
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield kind, "\n".join(data)
            kind, data = "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "data":
            data.append(value)
    if data:
        yield kind, "\n".join(data)
