from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from autoglm_lab import progress
from autoglm_lab.progress import Progress, shown
from autoglm_lab.units import GiB


class Terminal(io.StringIO):
    tty = True

    def isatty(self) -> bool:
        return self.tty


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    # The runner puts its own stream in the place of standard error between a fixture and its test.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream, modules={}))
    return stream


def far() -> tuple[str, int]:
    return "text", 2 * GiB


def test_a_moment_says_bytes_rate_and_what_is_under_way() -> None:
    assert str(Progress("loading", "text", 2 * GiB, 8 * GiB, 4.0)) == (
        "loading text · 2.00 GiB of 8.00 GiB · 512.0 MiB/s"
    )
    assert str(Progress("loading", "", 0, 8 * GiB, 0.0)) == "loading · 0 B of 8.00 GiB"
    assert 'aria-valuenow="25"' in Progress("loading", "a<b", 2 * GiB, 8 * GiB, 4.0).to_html()
    assert "a&lt;b" in Progress("loading", "a<b", 2 * GiB, 8 * GiB, 4.0).to_html()


def test_a_terminal_gets_one_line(terminal: Terminal) -> None:
    with shown(None, "loading", 2 * GiB, far):
        pass
    written = terminal.getvalue()
    assert written.count("\n") == 1
    assert written.endswith("100%\n")
    assert "loading text · 2.00 GiB of 2.00 GiB" in written


@pytest.mark.parametrize(("wanted", "total", "tty"), [(False, 2 * GiB, True), (None, 1000, True), (None, GiB, False)])
def test_it_is_silent_where_nobody_looks_or_there_is_little_to_see(
    terminal: Terminal, wanted: bool | None, total: int, tty: bool
) -> None:
    terminal.tty = tty
    with shown(wanted, "loading", total, far):
        pass
    assert terminal.getvalue() == ""


def test_asked_for_it_shows_however_little_there_is(terminal: Terminal) -> None:
    terminal.tty = False
    with shown(True, "loading", 1000, far):
        pass
    assert "loading" in terminal.getvalue()


def test_what_is_interrupted_says_so(terminal: Terminal) -> None:
    with pytest.raises(ZeroDivisionError), shown(True, "loading", 1000, far):
        raise ZeroDivisionError
    assert terminal.getvalue().endswith("interrupted\n")


def test_a_cell_is_rewritten_in_place_and_empty_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, str]] = []
    handle = SimpleNamespace(update=lambda data, **_: written.append(data))
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=lambda *_, **__: handle))
    with shown(None, "loading", GiB, far):
        pass
    assert "progressbar" in written[0]["text/html"]
    assert written[-1] == {"text/html": "", "text/plain": ""}
