"""How far something long is: bytes, rate and what is under way, in the cell or on the terminal's last line."""

from __future__ import annotations

import html
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from autoglm_lab.units import MiB, format_bytes

WORTH_IT = 256 * MiB
"""Less than this is not shown unless asked for: it is over before one has read it."""
_EVERY = 0.2
Far = Callable[[], tuple[str, int]]
"""What is under way, and the bytes that are done. Asked by a thread of its own."""


@contextmanager
def shown(wanted: bool | None, what: str, total: int, far: Far) -> Iterator[None]:
    """Show how far the block is.

    Args:
        wanted: False: nothing is shown. None: in a notebook or a terminal, where there is enough to do; otherwise
            nothing. True: however little there is to do, also where standard error is a file.
        what: is done: ``loading``.
        total: bytes when it is over.
        far: asked five times a second.
    """
    kind = None if wanted is False or total == 0 else _surface_of(forced=wanted is True)
    if kind is None or (wanted is None and total < WORTH_IT):
        yield
        return
    surface: _Surface = kind()
    begun, over = time.perf_counter(), threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY):
            surface.show(Progress(what, *far(), total, time.perf_counter() - begun))

    thread = threading.Thread(target=watch, name="autoglm-lab progress", daemon=True)
    surface.show(Progress(what, "", 0, total, 0.0))
    thread.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        over.set()
        thread.join()
        surface.end(Progress(what, *far(), total, time.perf_counter() - begun), failed=failed)


def visible(wanted: bool | None) -> bool:
    """Whether someone looks, or is to be shown it all the same."""
    return _surface_of(forced=wanted is True) is not None if wanted is not False else False


class Progress:
    """One moment.

    Args:
        what: is done.
        part: the part that is under way; empty: none.
        done: bytes.
        total: bytes when it is over.
        seconds: since it began.
    """

    def __init__(self, what: str, part: str, done: int, total: int, seconds: float) -> None:
        self.what, self.part, self.done, self.total, self.seconds = what, part, done, total, seconds

    @property
    def share(self) -> float:
        """0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 1.0

    def __str__(self) -> str:
        rate = f" · {format_bytes(round(self.done / self.seconds))}/s" if self.done and self.seconds > 0 else ""
        part = f" {self.part}" if self.part else ""
        return f"{self.what}{part} · {format_bytes(self.done)} of {format_bytes(self.total)}{rate}"

    def to_html(self) -> str:
        """A bar and the figures beneath it, without script or style sheet."""
        percent = f"{100 * self.share:.0f}"
        return (
            f'<div role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}" '
            'style="height:6px;max-width:480px;border-radius:3px;background:var(--jp-layout-color3,#ddd)">'
            f'<div style="width:{percent}%;height:100%;border-radius:3px;background:var(--jp-brand-color1,#1976d2)">'
            f"</div></div><small>{html.escape(str(self))}</small>"
        )


class _Surface(Protocol):
    def show(self, progress: Progress) -> None: ...
    def end(self, progress: Progress, *, failed: bool) -> None: ...


class _Line:
    """The last line of a terminal; what is left of it at the end is one line that says what was done."""

    def __init__(self) -> None:
        self._stream, self._width = sys.stderr, 0

    def show(self, progress: Progress) -> None:
        text = f"{progress} · {progress.share:.0%}"
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def end(self, progress: Progress, *, failed: bool) -> None:
        self.show(progress)
        self._stream.write(" · interrupted\n" if failed else "\n")
        self._stream.flush()


class _Cell:
    """An output of the cell that is rewritten in place; gone when all went well."""

    def __init__(self) -> None:
        display: Any = importlib.import_module("IPython.display")
        self._handle: Any = display.display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, progress: Progress) -> None:
        self._handle.update({"text/html": progress.to_html(), "text/plain": str(progress)}, raw=True)

    def end(self, progress: Progress, *, failed: bool) -> None:
        if failed:
            self.show(progress)
        else:
            self._handle.update({"text/html": "", "text/plain": ""}, raw=True)


def _surface_of(*, forced: bool) -> type[_Cell | _Line] | None:
    if _in_notebook():
        return _Cell
    return _Line if forced or sys.stderr.isatty() else None


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None
