"""How much of the device the process may use, and when unused memory is given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoglm_lab.memory.events import Event
from autoglm_lab.memory.planning.cards import USABLE
from autoglm_lab.units import GiB, exact_bytes
from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.settings import set_policy
from autoglm_lab.widgets.snapshot import Snapshot

_SIZES = (1, 2, 4, *USABLE)
_MOST = 4


def cards(total: int) -> list[dict[str, int]]:
    """Smaller cards that this device can pretend to be: nominal GiB and the budget in bytes that stands for each.

    At most four, the largest that fit; where the device is smaller than the cards that are known, round sizes.
    """
    fitting = [{"gib": gib, "budget": USABLE.get(gib, gib * GiB)} for gib in _SIZES]
    return [card for card in fitting if card["budget"] < total * 0.98][-_MOST:]


def budget_state(snapshot: Snapshot) -> dict[str, Any]:
    """Budget in bytes (None: the whole device) and what takes its part, reclaim settings, and the last one's gain."""
    policy, ledger = snapshot.policy, snapshot.ledger
    return {
        "budget": policy.budget,
        "budget_text": "" if policy.budget is None else _text(policy.budget),
        "total": ledger.total,
        "cards": cards(ledger.total or 0),
        "context": ledger.of_kind("context"),
        "process": ledger.process,
        "every_answers": policy.reclaim.every_answers,
        "cached_share": policy.reclaim.cached_share,
        "traceback": policy.reclaim.traceback,
        "expandable_segments": policy.reclaim.expandable_segments,
        "pinned": "" if policy.pinned is None else _text(policy.pinned),
        "pinned_now": _pinned(snapshot),
        "last": last_reclaim(snapshot.events),
        "control": snapshot.capabilities.memory_control,
        "gpu": snapshot.on_gpu,
    }


def last_reclaim(events: Sequence[Event]) -> int | None:
    """Bytes that the last reclaim gave back; None before the first."""
    return next((event.nbytes or 0 for event in reversed(events) if event.kind == "reclaimed"), None)


def _text(nbytes: int) -> str:
    """A size as a person would write it; one that no unit says exactly is rounded."""
    exact = exact_bytes(nbytes)
    return exact if isinstance(exact, str) and len(exact) < 8 else f"{nbytes / GiB:.2f}GiB"


def _pinned(snapshot: Snapshot) -> int:
    rows = snapshot.ledger.on("host")
    return sum(row.nbytes or 0 for row in rows if row.kind == "weights" and "pinned" in row.counts)


class BudgetPanel(Panel):
    """Settings of the budget, of pinned memory and of `ReclaimPolicy`, and reclaim now."""

    name = "budget_panel"
    of_memory = True

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        return budget_state(snapshot)

    def do_budget(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Set the budget: bytes, text such as ``24GiB``, or None for the whole device."""
        if self.host is not None:
            bench, budget = self.host.bench, content["budget"] or None
            self.run("budget", lambda: set_policy(bench, budget=budget))

    def do_pinned(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Set the most bytes of pinned host memory: text such as ``16GiB``, or None for half of the host's."""
        if self.host is not None:
            bench, pinned = self.host.bench, content["pinned"] or None
            self.run("pinned", lambda: set_policy(bench, pinned=pinned))

    def do_set(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Change one setting of the policy's ``reclaim`` part."""
        if self.host is not None:
            bench, setting, value = self.host.bench, str(content["setting"]), content["value"]
            self.run(setting, lambda: set_policy(bench, reclaim={setting: value}))

    def do_now(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        if self.host is not None:
            self.run("now", self.host.bench.engine.reclaim)
