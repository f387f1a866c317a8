"""Live sound for a model behind a server of ours: fed while it is spoken, then asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as listen

import autoglm_lab as lab
from autoglm_lab.engine.protocol import TextDelta, Turn
from autoglm_lab.engine.remote.link import Link
from autoglm_lab.engine.remote.live_turn import LiveTurn
from autoglm_lab.engine.remote.loop import Loop
from autoglm_lab.errors import AdmissionError, ConversationError, EndpointError, MediaError, ModuleError
from autoglm_lab.samples import SAMPLES
from autoglm_lab.serving import serve
from tests.unit.widgets.browser import until

NUMBER = next(sample for sample in SAMPLES if sample.name == "number")


@pytest.fixture(scope="module")
def pcm() -> Any:
    import soundfile

    samples, rate = soundfile.read(NUMBER.audio, dtype="float32")
    assert rate == 16_000
    return samples


def spoken(bench: Any, pcm: Any, **options: Any) -> Turn:
    """A live turn that has heard the number."""
    turn = bench.chat(live=True, **options)
    for start in range(0, len(pcm), 1601):
        turn.feed(pcm[start : start + 1601])
    return turn


def test_what_is_spoken_to_a_server_is_answered_as_here(
    wb: lab.Workbench, remote: lab.RemoteWorkbench, pcm: Any
) -> None:
    question = NUMBER.prompt["en"]
    remote.chat("hello", system="be brief", max_new_tokens=4).result(60)
    wb.chat("hello", system="be brief", max_new_tokens=4, conversation="here").result(60)
    turn = spoken(remote, pcm).ask(question)
    there, here = turn.result(60), spoken(wb, pcm, conversation="here").ask(question).result(60)
    assert there.text == here.text == NUMBER.answer
    assert there.usage.prompt_tokens == here.usage.prompt_tokens
    assert there.usage.audio_tokens == here.usage.audio_tokens > 0
    assert "".join(one.text for one in turn if isinstance(one, TextDelta)) == there.text
    # The next turn sends the sound whole, and the server finds all of it kept.
    after, here = (
        bench.chat("And then?", max_new_tokens=4, **more).result(60)
        for bench, more in ((remote, {}), (wb, {"conversation": "here"}))
    )
    assert after.text == here.text
    assert after.usage.cached_tokens == here.usage.cached_tokens >= there.usage.prompt_tokens
    assert [info.turns for info in remote.conversations if info.name == "main"] == [3]


def test_the_settings_of_a_live_turn_and_its_text_go_along(
    wb: lab.Workbench, remote: lab.RemoteWorkbench, pcm: Any
) -> None:
    there = spoken(remote, pcm, text="Listen.", max_new_tokens=2).ask().result(60)
    here = spoken(wb, pcm, text="Listen.", max_new_tokens=2, conversation="here").ask().result(60)
    assert there.usage == here.usage and there.usage.completion_tokens == 2
    assert there.text == here.text


def test_a_live_turn_needs_sound_and_is_asked_once(remote: lab.RemoteWorkbench, pcm: Any) -> None:
    turn = remote.chat(live=True, max_new_tokens=2)
    with pytest.raises(MediaError, match="the live sound is empty"):
        turn.ask()
    with pytest.raises(MediaError, match=r"mono samples of shape \[samples\]"):
        turn.feed(np.zeros((2, 100)))
    with pytest.raises(MediaError, match="over its limit of 600 s"):
        turn.feed(np.zeros(601 * 16_000, dtype=np.float32))
    turn.feed(pcm)
    turn.ask("What is it?")
    with pytest.raises(ConversationError):
        turn.ask("Once more?")
    with pytest.raises(ConversationError):
        turn.feed(pcm)
    assert turn.result(60).usage.completion_tokens == 2


def test_a_live_turn_that_is_stopped_leaves_nothing(wb: lab.Workbench, remote: lab.RemoteWorkbench, pcm: Any) -> None:
    turn = spoken(remote, pcm)
    assert turn.run.phase == "idle"
    turn.cancel()
    assert turn.result(60).finish_reason == "cancelled"
    assert [info.turns for info in remote.conversations if info.turns] == []
    assert remote.chat("hello", max_new_tokens=2).result(60).usage.audio_tokens == 0


def test_a_client_speaks_too_and_hears_why_not(wb: lab.Workbench, pcm: Any) -> None:
    with (
        serve(wb, port=0, api_key="client", admin_key="admin") as service,
        lab.connect(service.url, api_key="client") as client,
    ):
        client.chat("hello", max_new_tokens=2).result(60)
        heard = spoken(client, pcm, max_new_tokens=2).ask().result(60)
        assert heard.usage.prompt_tokens > heard.usage.audio_tokens + 10  # what was said before went along
        until(lambda: wb.conversations == (), "the server to forget")
        with pytest.raises(EndpointError, match="'force' tries what does not fit"):
            spoken(client, pcm, force=True).result(60)
        wb.policy = wb.policy.replace(modules={"audio": "off"})
        with pytest.raises(ModuleError, match="which the policy keeps off"):
            spoken(client, pcm).result(60)


def test_what_does_not_fit_is_the_same_error(
    wb: lab.Workbench, remote: lab.RemoteWorkbench, pcm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: Any, force: bool, **__: Any) -> None:
        if not force:
            raise AdmissionError("prefill", 9, 2, ["shorten the prompt"])

    monkeypatch.setattr(wb.engine.state.admission, "check", check)
    with pytest.raises(AdmissionError, match="shorten the prompt"):
        spoken(remote, pcm).ask().result(60)
    assert spoken(remote, pcm, force=True, max_new_tokens=2).ask().result(60).usage.completion_tokens == 2


# servers that fail


@contextlib.contextmanager
def server(*says: Any, hangs: bool = False) -> Iterator[str]:
    """A server that is asked, says something, and goes away or falls silent."""

    def handle(socket: ServerConnection) -> None:
        socket.send(json.dumps({"type": "ready"}))
        while '"ask"' not in str(socket.recv()):
            pass
        for one in says:
            socket.send(json.dumps(one))
        for _ in socket if hangs else ():
            pass

    with listen(handle, "127.0.0.1", 0) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.socket.getsockname()[1]}/v1"
        found.shutdown()
        thread.join()


def asked(url: str, timeout: float = 30.0) -> Any:
    """What comes of a live turn there."""
    loop, done = Loop(), Future[Any]()
    live = LiveTurn(Turn("main", cancel=lambda _: None), None, Link(url), loop=loop, timeout=timeout)

    async def read() -> None:
        try:
            done.set_result(await live.read([], {}))
        except Exception as error:  # noqa: BLE001 - the test gets it
            done.set_exception(error)

    loop.run(read())
    live.feed(np.zeros(100))
    live.ask(None)
    try:
        return done.result(60)
    finally:
        loop.close()
        live.link.close()


def test_a_server_that_falls_silent_or_goes_is_told_with_what_came() -> None:
    said = {"type": "text", "text": "Hello"}
    with server(said, hangs=True) as url, pytest.raises(EndpointError, match=r"sent nothing .* 5 characters of the a"):
        asked(url, timeout=0.2)
    with server(said) as url, pytest.raises(EndpointError, match=r"ended the stream .* 5 characters of the answer"):
        asked(url)
    with server({"type": "text"}, hangs=True) as url, pytest.raises(EndpointError, match="no word of a live turn"):
        asked(url)
    with pytest.raises(EndpointError, match=r"there is no server at 127\.0\.0\.1:9"):
        asked("http://127.0.0.1:9/v1")
