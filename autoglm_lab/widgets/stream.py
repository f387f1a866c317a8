"""An answer that streams into the cell that awaits it."""

from __future__ import annotations

import time
from html import escape
from typing import Any

from autoglm_lab.engine.protocol import Answer, Turn

_INTERVAL = 0.08


async def stream_into_cell(turn: Turn) -> None:
    """Show ``turn`` in the cell under way until it is finished; outside of a notebook nothing is shown.

    The text stands in the cell's output as ``text/html`` and as ``text/plain``, so it survives without JavaScript.
    """
    shell = _kernel()
    if shell is None:
        return
    from IPython.display import display

    handle = display(_View(turn), display_id=True)  # type: ignore[no-untyped-call]
    shown = time.monotonic()
    try:
        async for event in turn:
            if isinstance(event, Answer):
                object.__setattr__(event, "_shown_in", shell.execution_count)
            elif time.monotonic() - shown >= _INTERVAL:
                shown = time.monotonic()
                handle.update(_View(turn))
    finally:
        handle.update(_View(turn))


class _View:
    """A turn as far as it is, for the notebook. Its plain text is the answer alone: the same at every run."""

    def __init__(self, turn: Turn) -> None:
        self._text, self._reasoning = turn.text, turn.reasoning
        self._figures = turn.result(0).figures if turn.done and turn.error is None else ""

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        thought = f"<details><summary>thought</summary>{escape(self._reasoning)}</details>" if self._reasoning else ""
        figures = f'<div style="opacity:.65;font-size:85%">{escape(self._figures)}</div>' if self._figures else ""
        return f'{thought}<div style="white-space:pre-wrap">{escape(self._text)}</div>{figures}'


def _kernel() -> Any:
    """IPython's shell when this is a kernel, else None."""
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return None
    shell = get_ipython()
    return shell if shell is not None and hasattr(shell, "kernel") else None
