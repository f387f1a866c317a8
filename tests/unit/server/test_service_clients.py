"""The clients of the load bench: they count what they see."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import autoglm_lab as lab
from autoglm_lab.bench import service_clients
from autoglm_lab.bench.serve import turn_figures
from autoglm_lab.bench.service_clients import Tally, load, turns
from autoglm_lab.server.run import Serving
from tests.unit.server.payloads import screen, user

KINDS = ("cold", "warm", "held")
BODIES: list[dict[str, Any]] = [
    {"messages": [user("Who are you?")], "max_tokens": 6},
    {"messages": [user("Tap the red circle", screen())], "max_tokens": 6},
]


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_clients, "_LOOK", 0.01)
    monkeypatch.setattr(service_clients, "_PATIENCE", 0.0)


def test_every_answer_is_counted_and_compared(wb: lab.Workbench, served: Serving) -> None:
    tally = asyncio.run(load(served.url, BODIES, clients=3, requests=2, seed=1))
    assert (tally.right, tally.wrong, tally.failed, tally.tokens) == (6, 0, {}, 36)
    assert len(tally.first) == 6 and min(tally.first) > 0


def test_a_wrong_answer_is_found(wb: lab.Workbench, served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = service_clients.ask, []

    async def changing(client: Any, body: dict[str, Any], tally: Tally) -> Any:
        asked.append(body)
        text = "Who are you?" if len(asked) <= 1 else "Tap it"
        return await real(client, {**body, "messages": [user(text)]}, tally)

    monkeypatch.setattr(service_clients, "ask", changing)
    tally = asyncio.run(load(served.url, BODIES[:1], clients=2, requests=1, seed=1))
    assert (tally.right, tally.wrong) == (0, 2)


def test_second_turns_are_timed_cold_warm_and_held(wb: lab.Workbench, served: Serving) -> None:
    prompts = {kind: [f"{number} is the number of {kind}. " * 3 for number in range(2)] for kind in KINDS}
    (found,) = asyncio.run(turns({"ours": [served.url, ""]}, prompts, "And then?", 2)).values()
    assert {kind: len(seconds) for kind, seconds in found.items()} == {"cold": 2, "warm": 2, "held": 2}


SECONDS = {"cold": [3.0, 2.0, 4.0], "warm": [0.2, 0.1, 0.3], "held": [0.25]}


def test_a_warm_turn_is_judged_beside_vllm() -> None:
    for vllm, met in (([0.2], True), ([0.19], False)):
        cold, warm, held = turn_figures(
            SECONDS, {"vLLM": {"cold": [1.0], "warm": vllm, "held": [0.2]}, "llama.cpp": SECONDS}
        )
        assert (cold.ours, cold.bar, cold.meets) == (3.0, "", None)
        assert (warm.bar, warm.meets) == ("<= 0.1 x cold, <= vLLM", met)
        assert (held.bar, held.meets, held.peers) == ("<= 0.1 x cold", True, {"vLLM": 0.2, "llama.cpp": 0.25})


def test_a_warm_turn_in_vllms_precision_is_judged_where_it_was_measured() -> None:
    for rounded, met in (([0.19], True), ([0.21], False)):
        vllm, ours = ({"cold": [1.0], "warm": warm, "held": [0.2]} for warm in ([0.2], rounded))
        _, warm, _ = turn_figures(SECONDS, {"vLLM": vllm, "ours in bfloat16": ours})
        assert (warm.bar, warm.meets) == ("<= 0.1 x cold, in bfloat16 <= vLLM", met)


def test_a_warm_turn_without_vllm_is_judged_beside_a_cold_one() -> None:
    for seconds, met in ((SECONDS, True), (SECONDS | {"warm": [0.31]}, False)):
        _, warm, _ = turn_figures(seconds, {"llama.cpp": SECONDS})
        assert (warm.bar, warm.meets) == ("<= 0.1 x cold", met)


def test_second_turns_are_timed_at_a_server_that_closes_connections_it_said_it_keeps() -> None:
    async def timed() -> dict[str, dict[str, list[float]]]:
        async with forgetful_server() as url:
            servers = {"one": [url, "any"], "two": [url, "any"]}
            return await turns(servers, {kind: ["Hello", "Hi"] for kind in KINDS}, "And then?", 2)

    for found in asyncio.run(timed()).values():
        assert {kind: len(seconds) for kind, seconds in found.items()} == {"cold": 2, "warm": 2, "held": 2}


def test_a_second_turn_is_timed_when_the_machine_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [100.0, 80.0, 3.0]
    monkeypatch.setattr(service_clients, "_PATIENCE", 60.0)
    monkeypatch.setattr(service_clients.psutil, "cpu_percent", lambda _: seen.pop(0))

    async def timed() -> dict[str, dict[str, list[float]]]:
        async with forgetful_server() as url:
            return await turns({"one": [url, ""]}, {"cold": ["Hello"], "warm": [], "held": []}, "And then?", 2)

    assert len(asyncio.run(timed())["one"]["cold"]) == 1
    assert seen == []


@asynccontextmanager
async def forgetful_server() -> AsyncIterator[str]:
    """A server that closes a connection on its second request, unanswered, where it is not asked to close it before."""
    chunk = {"choices": [{"delta": {"content": "Yes."}}], "usage": {"completion_tokens": 1}}
    data = f"data: {json.dumps(chunk)}\n\n".encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nkeep-alive: timeout=5\r\n"
    answer = head + b"content-length: %d\r\n\r\n%b" % (len(data), data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        (length,) = [line.split(":")[1] for line in asked.splitlines() if line.startswith("content-length:")]
        await reader.readexactly(int(length))
        writer.write(answer)
        await writer.drain()
        if "connection: close" not in asked:
            await reader.read(1)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
