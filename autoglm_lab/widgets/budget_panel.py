"""How much of the device the process may use, and when unused memory is given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoglm_lab.memory.events import Event
from autoglm_lab.units import GiB
from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.settings import set_policy
from autoglm_lab.widgets.snapshot import Snapshot

_CARDS = tuple(size * GiB for size in (1, 2, 4, 8, 12, 16, 24, 32, 48, 80))


def presets(total: int) -> list[int]:
    """Sizes of smaller cards that this device can pretend to be, in bytes: at most four, the largest that fit."""
    return [size for size in _CARDS if size < total * 0.98][-4:]


def budget_state(snapshot: Snapshot) -> dict[str, Any]:
    """Budget in bytes (None: the whole device), reclaim settings, and what the last reclaim gave back."""
    policy = snapshot.policy
    return {
        "budget": policy.budget,
        "total": snapshot.ledger.total,
        "presets": presets(snapshot.ledger.total),
        "every_answers": policy.reclaim.every_answers,
        "cached_share": policy.reclaim.cached_share,
        "traceback": policy.reclaim.traceback,
        "last": last_reclaim(snapshot.events),
        "control": snapshot.capabilities.memory_control,
    }


def last_reclaim(events: Sequence[Event]) -> int | None:
    """Bytes that the last reclaim gave back; None before the first."""
    return next((event.nbytes or 0 for event in reversed(events) if event.kind == "reclaimed"), None)


class BudgetPanel(Panel):
    """Settings of the budget and of `ReclaimPolicy`, and reclaim now."""

    name = "budget_panel"

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        return budget_state(snapshot)

    def do_budget(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Set the budget: bytes, text such as ``24GiB``, or None for the whole device."""
        if self.host is not None:
            bench, budget = self.host.bench, content["budget"] or None
            self.run("budget", lambda: set_policy(bench, budget=budget))

    def do_set(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Change one setting of the policy's ``reclaim`` part."""
        if self.host is not None:
            bench, setting, value = self.host.bench, str(content["setting"]), content["value"]
            self.run(setting, lambda: set_policy(bench, reclaim={setting: value}))

    def do_now(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        if self.host is not None:
            self.run("now", self.host.bench.engine.reclaim)
