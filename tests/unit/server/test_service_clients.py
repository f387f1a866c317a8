"""The clients of the load bench: they count what they see."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import autoglm_lab as lab
from autoglm_lab.bench import service_clients
from autoglm_lab.bench.service_clients import Tally, load, turns
from autoglm_lab.server.run import Serving
from tests.unit.server.payloads import screen, user

BODIES: list[dict[str, Any]] = [
    {"messages": [user("Who are you?")], "max_tokens": 6},
    {"messages": [user("Tap the red circle", screen())], "max_tokens": 6},
]


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
    prompts = [f"{number} is the number. " * 3 for number in range(6)]
    found = asyncio.run(turns(served.url, None, prompts, ["And then?"], 2))
    assert {kind: len(seconds) for kind, seconds in found.items()} == {"cold": 2, "warm": 2, "held": 2}
