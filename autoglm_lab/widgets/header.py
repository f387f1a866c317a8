"""The header: which model, where, what it is doing; language and Stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoglm_lab.units import format_bytes
from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.snapshot import Snapshot


class Header(Panel):
    """The first line of the dashboard.

    Attributes:
        rate: tokens per second of the running or last answer; None before the first. Set by the dashboard.
        closed: the workbench was closed.
        still: the mark of the static picture that this view replaces.
    """

    name = "header"
    rate: float | None = None
    still: str = ""

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        able, budget = snapshot.capabilities, snapshot.policy.budget
        device = able.device
        total = snapshot.ledger.total
        if budget is not None and total is not None and budget < total:
            device += f", {format_bytes(budget)} budget"
        return {
            "model": able.model,
            "detail": " · ".join(part for part in (able.dtype, able.where, device) if part),
            "phase": snapshot.phase,
            "rate": self.rate,
            "still": self.still,
            "closed": False,
        }

    def beat(self) -> None:
        """Tell the browser that the kernel is there. Called by the refresher alone."""
        self.send({"kind": "beat"})

    def do_view(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """A view opened or went: no one is served who does not look."""
        if self.host is not None:
            self.host.watch(1 if content["open"] else -1)

    def do_stop(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        if self.host is not None:
            self.run("stop", self.host.bench.engine.stop, lane="stop")

    def do_language(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        if self.host is not None:
            self.host.turn_language()
