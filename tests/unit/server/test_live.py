"""`/v1/audio/live`: sound while it is spoken, then the question."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import autoglm_lab as lab
from autoglm_lab.server.run import Serving
from tests.unit.server.payloads import sample


@pytest.fixture
def address(wb: lab.Workbench, served: Serving) -> str:
    return served.url.replace("http://", "ws://") + "/audio/live"


def pcm(form: str) -> bytes:
    path = sample("number").audio
    assert path is not None
    samples, rate = soundfile.read(path, dtype="int16" if form == "s16le" else "float32")
    assert rate == 16_000
    return bytes(np.asarray(samples).tobytes())


def told(socket: ClientConnection, last: str) -> list[dict[str, Any]]:
    """What the service says up to a message of type ``last``."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["type"] != last:
        found.append(json.loads(socket.recv(30)))
    return found


@pytest.mark.parametrize(("form", "size"), [("s16le", 1000), ("f32le", 6404)])
def test_live_sound_is_answered_as_the_whole_clip(address: str, wb: lab.Workbench, form: str, size: int) -> None:
    raw, asked = pcm(form), sample("number")
    with connect(f"{address}?format={form}") as socket:
        assert json.loads(socket.recv(30)) == {"type": "ready"}
        for start in range(0, len(raw), size):
            socket.send(raw[start : start + size])
        socket.send(json.dumps({"type": "ask", "text": asked.prompt["en"]}))
        found = told(socket, "answer")
        assert "".join(one["text"] for one in found if one["type"] == "text") == asked.answer
        assert found[-1]["answer"]["text"] == asked.answer
        assert found[-1]["usage"]["prompt_tokens_details"]["audio_tokens"] > 0
        assert told(socket, "ready")
        (info,) = wb.conversations
        assert info.turns == 1


def test_the_settings_come_before_the_sound(address: str) -> None:
    with connect(address) as socket:
        socket.send(json.dumps({"type": "start", "max_tokens": 2}))
        socket.send(pcm("s16le")[:16_000])
        socket.send(json.dumps({"type": "ask", "text": "What do you hear?"}))
        assert told(socket, "answer")[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("send", "message"),
    [
        ([b"abc"], "whole samples of s16le"),
        ([json.dumps({"type": "ask"})], "there was no sound"),
        (["{"], "Invalid JSON"),
        ([json.dumps({"type": "sing"})], "type: "),
        ([json.dumps({"type": "start", "n": 2})], "no 'n'"),
    ],
)
def test_what_is_no_sound_and_no_question_ends_the_connection(address: str, send: list[Any], message: str) -> None:
    with connect(address) as socket:
        for one in send:
            socket.send(one)
        assert message in told(socket, "error")[-1]["error"]["message"]
        with pytest.raises(ConnectionClosed):
            socket.recv(30)


def test_a_key_is_needed_and_pages_are_kept_out(another: Callable[..., Any], address: str) -> None:
    url = str(another(api_key="key").base_url).replace("http://", "ws://") + "audio/live"
    with pytest.raises(InvalidStatus), connect(url):
        pass
    with pytest.raises(InvalidStatus), connect(address, origin="https://evil.test"):  # type: ignore[arg-type]
        pass
    with connect(url, additional_headers={"authorization": "Bearer key"}) as socket:
        assert json.loads(socket.recv(30)) == {"type": "ready"}
