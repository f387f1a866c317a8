from __future__ import annotations

import time

from autoglm_lab.memory.events import Event
from autoglm_lab.widgets.events_panel import MOST_EVENTS, events_state
from tests.unit.widgets.browser import browser_sends, until


def listed(dashboard, kind):
    return [event for event in dashboard.events.state["events"] if event["kind"] == kind]


def test_a_reclaim_is_listed_with_what_it_gained_and_a_budget_with_its_bytes(wb, dashboard):
    browser_sends(dashboard.budget, "now")
    until(lambda: listed(dashboard, "reclaimed"), "the reclaim")
    [event] = [event for event in wb.events if event.kind == "reclaimed"][-1:]
    assert listed(dashboard, "reclaimed")[0] == event.to_dict() | {"times": 1}
    browser_sends(dashboard.budget, "budget", budget="4GiB")
    until(lambda: listed(dashboard, "budget"), "the budget")
    assert listed(dashboard, "budget")[0]["nbytes"] == 4 << 30


def test_captured_graphs_and_dropped_conversations_are_listed(wb, dashboard):
    wb.sampler.record(Event(time.time(), "note", "decode graphs", seconds=0.2, why="captured for a batch of 1"))
    wb.chat("你是谁?").result(60)
    browser_sends(dashboard.kv, "drop", conversation="main")
    until(lambda: listed(dashboard, "evicted"), "the conversation")
    assert listed(dashboard, "evicted")[0]["subject"] == "conversation 'main'"
    assert [event["why"] for event in listed(dashboard, "note") if event["subject"] == "decode graphs"]


def test_the_newest_events_come_first_and_repeated_ones_are_counted():
    events = [Event(float(n), "policy", "kv") for n in range(3)]
    events += [Event(float(10 + n), "woke", f"module {n}") for n in range(MOST_EVENTS + 5)]
    events += [Event(200.0 + n, "reclaimed", "cache", nbytes=5) for n in range(3)]
    state = events_state(events)
    assert len(state) == MOST_EVENTS
    assert (state[0]["kind"], state[0]["times"], state[0]["time"]) == ("reclaimed", 3, 202.0)
    assert [event["subject"] for event in state[1:3]] == [f"module {MOST_EVENTS + 4}", f"module {MOST_EVENTS + 3}"]
    assert events_state(events[:3]) == [events[2].to_dict() | {"times": 3}]
