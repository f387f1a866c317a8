"""Memory over time: what the sampler saw, drawn by the browser on a canvas."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.widgets.panel import Host, Panel
from autoglm_lab.widgets.series import SeriesBook, thin
from autoglm_lab.widgets.snapshot import Snapshot

HISTORY = 2000
"""Samples sent to a view that opens late."""
_PENDING = 600


class LivePlot(Panel):
    """Stacked areas by owner, with total, budget and events.

    New samples go to the browser as binary messages; a view that opens late asks for the history once.

    Args:
        card: number of the device, where the model lies on several.
    """

    name = "live_plot"
    of_memory = True
    parts = ("event_words", "plot_store", "plot_picture")

    def __init__(self, host: Host | None = None, *, card: int = 0, **settings: Any) -> None:
        """As `Panel`."""
        self._card = card
        self._book = SeriesBook()
        self._pending: deque[Ledger] = deque(maxlen=_PENDING)
        self._history_wanted = False
        self._last_event: Event | None = None
        self._total: int | None = 0
        super().__init__(host, **settings)

    def add(self, ledger: Ledger) -> None:
        """A new sample. Called from the sampler's thread: it only queues."""
        self._pending.append(ledger)

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        self._total = snapshot.ledgers[min(self._card, len(snapshot.others))].total
        return {"series": self._book.series, "total": self._total}

    def push(self, snapshot: Snapshot, history: Callable[[], Sequence[Ledger]]) -> int:
        """Send the browser what is new; returns the bytes sent. Called by the refresher alone.

        Args:
            snapshot: for its events.
            history: gives every sample there is, called where a view asked for them.
        """
        samples = [self._pending.popleft() for _ in range(len(self._pending))]
        kind = "samples"
        if self._history_wanted:
            self._history_wanted, self._last_event, kind = False, None, "history"
            samples = thin(history(), HISTORY)
        sent = 0
        if samples:
            message = self._book.encode(samples)
            self._put("state", {"series": self._book.series, "total": self._total})
            self.send({"kind": kind}, [message])
            sent = len(message)
        if fresh := self._fresh(snapshot.events):
            self.send({"kind": "events", "events": [event.to_dict() for event in fresh]})
        return sent

    def _fresh(self, events: Sequence[Event]) -> list[Event]:
        fresh: list[Event] = []
        for event in reversed(events):
            if event is self._last_event:
                break
            fresh.append(event)
        if events:
            self._last_event = events[-1]
        return fresh[:200][::-1]

    def do_history(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        self._history_wanted = True
        if self.host is not None:
            self.host.wake()
