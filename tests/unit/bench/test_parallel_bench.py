"""What the bench of several ranks makes of what its processes measured."""

from __future__ import annotations

from typing import Any

import pytest

from autoglm_lab.bench import parallel
from autoglm_lab.bench.bench import Bench
from autoglm_lab.errors import LabError


def measured(ranks: int, text: str = "same") -> dict[str, Any]:
    device = {"weights": 8 << 30, "kv": 1 << 20, "process": 9 << 30}
    return {
        "rate": 10.0 * ranks,
        "first": 0.5 / ranks,
        "prompt_tokens": 96,
        "answer_tokens": 24,
        "texts": [text],
        "devices": [device] * ranks,
    }


def report(monkeypatch: pytest.MonkeyPatch, **texts: str) -> dict[str, Any]:
    def fresh(_: str, __: float, *, ranks: int, small: bool, graphs: bool) -> dict[str, Any]:
        assert small
        assert graphs or ranks > 1
        return measured(ranks, texts.get(f"of_{ranks}", "same"))

    monkeypatch.setattr(parallel, "fresh", fresh)
    with Bench(small=True, ranks=4, say=lambda _: None) as bench:
        return {figure.name: figure for figure in parallel.run(bench).figures}


def test_every_rank_has_its_bytes_and_one_process_stands_beside_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = report(monkeypatch)
    assert figures["decoding on 4 ranks"].ours == 40.0
    assert figures["decoding on 4 ranks"].peers == {"one process": 10.0}
    assert figures["rank 0: weights"].peers == {"one process": 8 << 30}
    assert [name for name in figures if name.endswith("weights")] == [f"rank {rank}: weights" for rank in range(4)]
    assert figures["rank 3: process, after the answer"].peers == {}


@pytest.mark.parametrize(("text", "met"), [("same", True), ("another", False)])
def test_answers_that_differ_are_shown_as_missed(monkeypatch: pytest.MonkeyPatch, text: str, met: bool) -> None:
    assert report(monkeypatch, of_4=text)["answers that are the same"].meets is met


def test_a_process_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "fresh", lambda *_, **__: {"error": "rank 1 could not load its part"})
    with Bench(small=True, say=lambda _: None) as bench, pytest.raises(LabError, match="one process: rank 1 could not"):
        parallel.run(bench)
