"""Many clients at once: answered together, refused when there is no place, and forgotten when they go away."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import autoglm_lab as lab
from autoglm_lab.errors import AdmissionError
from autoglm_lab.server.places import Places
from autoglm_lab.server.request_error import RequestError
from autoglm_lab.server.run import Serving
from autoglm_lab.serving import serve
from tests.unit.server.payloads import screen, sound, user

PATH = "/chat/completions"
LONG: dict[str, Any] = {"messages": [user("Who are you?")], "max_tokens": 3000, "ignore_eos": True, "stream": True}


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come, however slow the machine is."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def test_answers_given_together_are_those_given_alone(client: httpx.Client) -> None:
    asked = [
        [user("你是谁?")],
        [user("Tap the red circle", screen())],
        [user("Type the digits you hear.", sound())],
        [user("Who are you?")],
    ]

    def answer(messages: list[dict[str, Any]]) -> str:
        found = client.post(PATH, json={"messages": messages, "max_tokens": 24}).json()
        return str(found["choices"][0]["message"]["content"])

    alone = [answer(messages) for messages in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, asked * 3))
    assert together == alone * 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_answer(served: Serving, wb: lab.Workbench, stream: bool) -> None:
    client = httpx.Client(base_url=served.url, timeout=60)
    if stream:
        with client.stream("POST", PATH, json=LONG) as response:
            lines = response.iter_lines()  # held: the connection closes with it
            next(lines)
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post(PATH, json={**LONG, "stream": False}, timeout=0.3)
    client.close()
    until(lambda: wb.conversations == ())


def test_a_client_that_goes_away_gives_its_place_to_the_next(another: Callable[..., httpx.Client]) -> None:
    client = another(running=1, waiting=4)
    with client.stream("POST", PATH, json=LONG) as response:
        lines = response.iter_lines()  # held: the connection closes with it
        next(lines)
    # 3000 tokens would take far longer than this client waits.
    assert client.post(PATH, json={"messages": [user("Hi")], "max_tokens": 1}, timeout=15).status_code == 200


def test_beyond_the_places_and_the_queue_a_client_is_told_when_to_come_back(
    another: Callable[..., httpx.Client],
) -> None:
    client = another(running=1, waiting=0)
    with client.stream("POST", PATH, json=LONG) as response:
        lines = response.iter_lines()  # held: the connection closes with it
        next(lines)
        refused = client.post(PATH, json={"messages": [user("Hi")]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
    metrics = client.get(str(client.base_url).removesuffix("v1/") + "metrics").text
    assert 'autoglm_errors_total{code="queue_full"} 1.0' in metrics


def refusing(wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch, refuses: Callable[[int], bool]) -> list[str]:
    """Let the engine refuse turns by how many others are under way. Returns those refused."""
    real, refused = wb.engine.state.admission, []

    class Refusing:
        def check(self, conversation: Any, *_: Any, **__: Any) -> None:
            others = [one for one in wb.engine.state.conversations if one.busy and one is not conversation]
            if refuses(len(others)):
                refused.append(conversation.name)
                raise AdmissionError("decode", 2 << 30, 1 << 30)

        def ended(self, *_: Any) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(wb.engine.state, "admission", Refusing())
    assert real is not None
    return refused


def test_a_request_that_does_not_fit_beside_another_waits_for_its_end(
    client: httpx.Client, wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refusing(wb, monkeypatch, lambda others: others > 0)
    with client.stream("POST", PATH, json=LONG) as response:
        lines = response.iter_lines()  # held: the connection closes with it
        next(lines)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.post, PATH, json={"messages": [user("Hi")], "max_tokens": 1})
            until(lambda: bool(refused))
            assert not waiting.done()
            response.close()
            assert waiting.result(60).status_code == 200


def test_a_request_that_does_not_fit_alone_is_refused(
    client: httpx.Client, wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(wb, monkeypatch, lambda others: True)
    response = client.post(PATH, json={"messages": [user("Hi")], "stream": True})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "does_not_fit")


@pytest.mark.parametrize("told", ["stop", "SIGTERM"])
def test_stopping_finishes_what_is_under_way_and_begins_nothing(wb: lab.Workbench, told: str) -> None:
    service = serve(wb, port=0)
    with httpx.Client(base_url=service.url, timeout=60) as client:
        kept = httpx.Client(base_url=service.url, timeout=60)
        kept.get("/models")
        with client.stream("POST", PATH, json={**LONG, "max_tokens": 100}) as response:
            lines = response.iter_lines()
            next(lines)
            if told == "SIGTERM":
                service._server.handle_exit(signal.SIGTERM, None)
            stopping = threading.Thread(target=service.stop)
            stopping.start()
            assert list(lines)[-2] == "data: [DONE]"
        stopping.join(60)
        with pytest.raises(httpx.ConnectError):
            httpx.get(service.url + "/models")
        kept.close()
    assert not service.running and repr(service).endswith("(stopped)")


def test_an_answer_that_does_not_end_is_stopped_when_the_time_to_drain_is_over(wb: lab.Workbench) -> None:
    service = serve(wb, port=0, drain_seconds=0.1)
    with httpx.Client(base_url=service.url, timeout=60) as client, client.stream("POST", PATH, json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        text = "".join(lines)
        stopping.join(60)
    assert '"finish_reason":"cancelled"' in text


def test_places_are_given_in_order_and_come_back() -> None:
    async def scene() -> list[str]:
        places, got = Places(1, 3), []

        async def take(name: str) -> None:
            await places.take()
            got.append(name)

        await take("a")
        waiting = [asyncio.ensure_future(take(name)) for name in ("b", "gone", "c")]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="1 answers are under way and 3 requests wait"):
            await places.take()
        waiting[1].cancel()
        for _ in range(2):
            places.leave(0.1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert (places.running, places.waiting) == (1, 0)
        places.leave(0.1)
        assert places.running == 0
        return got

    assert asyncio.run(scene()) == ["a", "b", "c"]


def test_who_goes_away_just_as_it_gets_a_place_gives_it_back() -> None:
    async def scene() -> int:
        places = Places(1, 1)
        await places.take()
        next_one = asyncio.ensure_future(places.take())
        await asyncio.sleep(0)
        places.leave(0.1)
        next_one.cancel()
        await asyncio.gather(next_one, return_exceptions=True)
        return places.running

    assert asyncio.run(scene()) == 0
