"""The command as a process of its own: killed in mid-stream, and begun again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import autoglm_lab as lab
from autoglm_lab import opening
from autoglm_lab.cli import app
from autoglm_lab.errors import LabError
from autoglm_lab.serving import serve
from tests.unit.server.payloads import user

_COMMAND = [sys.executable, "-c", "from autoglm_lab.cli import main; main()", "serve", "--device", "cpu"]
_LONG: dict[str, Any] = {
    "messages": [user("Who are you?")],
    "stream": True,
    "max_tokens": 300,
    "ignore_eos": True,
}


@contextlib.contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and the address that it says."""
    began = subprocess.Popen([*_COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert began.stdout is not None
        line = began.stdout.readline()
        assert " at http://127.0.0.1:" in line, line
        yield began, line.split(" at ")[1].strip()
    finally:
        began.kill()
        began.wait(30)
        assert began.stdout is not None
        began.stdout.close()


def test_killed_in_mid_stream_and_begun_again(wb: lab.Workbench) -> None:
    with process("--port", "0") as (killed, url), httpx.Client(base_url=url, timeout=10) as client:
        with client.stream("POST", "/chat/completions", json=_LONG) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(killed.pid, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):  # said within the client's timeout
                list(lines)
        port = int(url.split(":")[2].split("/")[0])
    with serve(wb, port=port), httpx.Client(base_url=url, timeout=30) as client:
        answer = client.post("/chat/completions", json={"messages": [user("Who are you?")]})
        assert "AutoGLM-Tiny" in answer.json()["choices"][0]["message"]["content"]


def test_what_cannot_be_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "load", lambda *_, **__: pytest.fail("loaded"))
    for options, message in [
        (["--host", "0.0.0.0"], "a service at 0.0.0.0 can be reached from other machines: give it a key"),
        (["--policy", "nowhere.yaml"], "there is no file nowhere.yaml"),
    ]:
        with pytest.raises(LabError, match=message):
            CliRunner().invoke(app, ["serve", *options], catch_exceptions=False)


def test_the_command_takes_what_the_dashboard_exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("kv: {max_tokens: 512}\n", encoding="utf-8")
    loaded: list[Any] = []

    def load(*given: Any, **settings: Any) -> Any:
        loaded.append((given, settings["policy"]))
        raise LabError("enough")

    monkeypatch.setattr(opening, "load", load)
    with pytest.raises(LabError, match="enough"):
        CliRunner().invoke(app, ["serve", "autoglm-tiny", "--policy", str(file)], catch_exceptions=False)
    assert loaded == [(("autoglm-tiny",), lab.MemoryPolicy(kv={"max_tokens": 512}))]
