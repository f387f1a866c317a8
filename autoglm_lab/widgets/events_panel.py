"""What happened to the memory, newest first: modules, graphs, prefixes, reclaims with what they gave, budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoglm_lab.memory.events import Event
from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.snapshot import Snapshot

MOST_EVENTS = 60
"""Events that are listed; all of them stay in ``wb.events``."""


def events_state(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The last events, newest first; those that follow one another and differ only in their time are one, counted."""
    listed: list[dict[str, Any]] = []
    for event in reversed(events):
        entry = event.to_dict()
        same = listed and all(listed[-1][key] == entry[key] for key in ("kind", "subject", "nbytes", "why"))
        if same:
            listed[-1]["times"] += 1
        elif len(listed) == MOST_EVENTS:
            break
        else:
            listed.append(entry | {"times": 1})
    return listed


class EventsPanel(Panel):
    """The events as a list; the live plot marks the same ones where they happened."""

    name = "events_panel"
    parts = ("event_words",)

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """As `Panel`."""
        self._last: tuple[int, Event | None] = (-1, None)
        self._events: list[dict[str, Any]] = []
        super().__init__(*arguments, **settings)

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        events = snapshot.events
        last = (len(events), events[-1] if events else None)
        if last != self._last:
            self._last, self._events = last, events_state(events)
        return {"events": self._events}
