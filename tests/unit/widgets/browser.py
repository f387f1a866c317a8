"""What a browser would do to a dashboard, and waiting for what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from autoglm_lab.widgets.dashboard import Dashboard
from autoglm_lab.widgets.panel import Panel


def browser_sends(panel: Panel, do: str, buffers: list[bytes] | None = None, **arguments: Any) -> None:
    """What the browser's `ui.send` makes of a click."""
    panel._receive(panel, {"do": do} | arguments, [memoryview(buffer) for buffer in buffers or []])


def open_view(dashboard: Dashboard) -> None:
    browser_sends(dashboard.header, "view", open=True)


def until(true: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)
