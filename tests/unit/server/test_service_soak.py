"""The soak: clients that a service outlives, and what would be found if it did not."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from typing import Any

import pytest

import autoglm_lab as lab
from autoglm_lab.bench import service_soak
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.rude_clients import KINDS, Target, be_rude
from autoglm_lab.bench.service_soak import Remains, soak_figures
from autoglm_lab.serving import serve
from tests.unit.server.payloads import sound, user

BODIES: list[dict[str, Any]] = [
    {"messages": [user("Who are you?")], "max_tokens": 6},
    {"messages": [user("What do you hear?", sound())], "max_tokens": 6},
]


def test_a_service_in_order_answers_every_rude_client_as_it_should(wb: lab.Workbench) -> None:
    async def scene(url: str) -> list[tuple[str, bool]]:
        target, chance = Target(url, "key", BODIES, 1_000_000), random.Random(5)
        return [await be_rude(target, kind, chance) for kind in KINDS for _ in range(4)]

    with serve(wb, port=0, api_key="key", body_bytes=1_000_000) as service:
        found = asyncio.run(scene(service.url))
    assert [came for came, fine in found if not fine] == []
    assert {came for came, _ in found} >= {"vanish 200", "garbage 400", "huge 413", "live gone", "half gone"}


def test_what_breaks_is_no_good_manners(wb: lab.Workbench) -> None:
    async def scene(url: str) -> tuple[str, bool]:
        return await be_rude(Target(url, "key", BODIES, 100), "huge", random.Random(5))

    with serve(wb, port=0, api_key="key") as service:  # takes larger bodies than it says
        assert asyncio.run(scene(service.url)) == ("huge 400", False)
    assert asyncio.run(scene("http://127.0.0.1:9/v1")) == ("huge ConnectError", False)


def test_the_soak_finds_nothing_at_a_service_in_order(wb: lab.Workbench) -> None:
    told: list[str] = []
    with Bench(small=True, soak=1.0, say=told.append) as bench:
        figures = {figure.name: figure for figure in soak_figures(bench, wb, BODIES)}
    assert {name: figure.ours for name, figure in figures.items() if figure.bar == "none"} == {
        "soak: wrong answers": 0,
        "soak: failures of the service": 0,
        "soak: threads, files, conversations left": 0,
    }
    assert figures["soak: owners' bytes beyond the warm-up"].meets
    assert figures["soak: right answers beside rude clients"].ours >= 1
    assert figures["soak: slope of anonymous memory over the second half"].meets is None
    assert any(one.endswith("1 s of clients that vanish, send garbage and go over limits") for one in told)


def test_what_stays_is_named(wb: lab.Workbench, tmp_path: Path) -> None:
    before, over = Remains.of(wb), threading.Event()
    thread = threading.Thread(target=over.wait, name="left over")
    thread.start()
    try:
        with (tmp_path / "file").open("w"):
            wb.chat("Hi", conversation="left", max_new_tokens=1).result(60)
            left = Remains.of(wb).beyond(before)
    finally:
        over.set()
        thread.join()
    assert left == ["thread left over", "conversation left", "1 files"]


def test_an_error_that_is_logged_counts_as_a_failure(wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def clients(*_: Any, **__: Any) -> dict[str, Any]:
        service_soak.logging.getLogger("asyncio").error("Task exception was never retrieved\nmore")
        return {"failed": {"half ReadError": 2}, "others": {}, "right": 1, "wrong": 0, "retried": 0}

    monkeypatch.setattr(service_soak, "run_clients", clients)
    with Bench(small=True, soak=0.0, say=lambda _: None) as bench:
        (failures,) = [one for one in soak_figures(bench, wb, BODIES) if "failures" in one.name]
    assert failures.meets is False and failures.ours == 2
    assert "asyncio: Task exception was never retrieved" in failures.name and "2 x half ReadError" in failures.name
