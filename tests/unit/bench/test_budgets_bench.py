"""The bench of budgets runs small: what is chosen and what plain transformers does, each row told."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autoglm_lab.bench import budgets
from autoglm_lab.bench.bench import Bench
from autoglm_lab.models.image_tokens import image_tokens, limit_image_tokens
from autoglm_lab.models.loading import outline
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB, MiB


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    torch.set_num_threads(1)

    def here(function: str, _patience: float, **arguments: Any) -> dict[str, Any]:
        """The same without a process of its own: starting one takes longer than the row."""
        return dict(getattr(budgets, function.partition(":")[2])(**arguments))

    monkeypatch.setattr(budgets, "fresh", here)
    with Bench(small=True, say=lambda _: None) as session:
        yield session


def test_each_budget_has_its_settings_its_peak_and_its_speed_beside_transformers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "_rounding", lambda *_: None)
    report = budgets.run(bench)
    roomy = [one for one in report.figures if one.name.startswith("8.00 GiB, exact")]
    assert [one.unit for one in roomy] == ["B", "s", "tokens/s"]
    for one in roomy:
        assert one.ours is not None and one.ours > 0
        assert one.peers["transformers"] is not None
        assert one.meets is None, "a small run judges no bar"
    assert any(note.startswith("8.00 GiB, exact: Chosen: the settings as they are") for note in report.notes)
    tight = [one for one in report.figures if one.name.startswith("64.0 MiB")]
    assert [one.ours for one in tight] == [None, None, None]
    assert any(note.startswith("64.0 MiB, exact: LoadError: autoglm-tiny, ") for note in report.notes)


def test_where_layers_would_stay_on_the_host_rounded_weights_are_a_row_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    def told(function: str, _patience: float, **arguments: Any) -> dict[str, Any]:
        asked.append((function.partition(":")[2], arguments.get("quantize")))
        return {"error": "OutOfMemoryError while loading: CUDA out of memory."}

    monkeypatch.setattr(budgets, "fresh", told)
    monkeypatch.setattr(budgets, "_rounding", lambda _bench, budget: "int8" if budget < GiB else None)
    report = budgets.run(bench)
    assert asked == [("stock", None), ("ours", None), ("stock", None), ("ours", None), ("ours", "int8")]
    assert "64.0 MiB, transformers: OutOfMemoryError while loading: CUDA out of memory." in report.notes
    assert [one.name.split(":")[0] for one in report.figures[-3:]] == ["64.0 MiB, weights in int8"] * 3


@pytest.mark.parametrize(
    ("on_host", "rounded"),
    [({None: 0}, None), ({None: 5, "int8": 0}, "int8"), ({None: 5, "int8": 1, "int4": 0}, "int4")],
)
def test_weights_are_rounded_no_more_than_keeps_the_layers_on_the_device(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, on_host: dict[str | None, int], rounded: str | None
) -> None:
    def plan(_model: str, policy: str, *, quantize: str | None, budget: int, **_: Any) -> Any:
        assert (policy, budget) == ("auto", GiB)
        return SimpleNamespace(fits=True, policy=MemoryPolicy(placement={"host_bytes": on_host[quantize]}))

    monkeypatch.setattr(budgets, "plan", plan)
    assert budgets._rounding(bench, GiB) == rounded


def test_a_peak_over_the_budget_misses_its_bar() -> None:
    with Bench(small=True, say=lambda _: None) as session:
        session.small = False
        for peak, meets in ((100 * MiB, True), (101 * MiB, False)):
            ours = {"peak": peak, "settings": "kv.chunk=512", "first": 1.0, "rate": 2.0}
            figure = budgets._figures(session, "100.0 MiB, exact", 100 * MiB, ours, {})[0]
            assert figure.meets is meets
            assert figure.name == "100.0 MiB, exact (kv.chunk=512): peak of the process"


def test_a_screen_takes_the_tokens_of_the_phone_agents_trace() -> None:
    processor = outline("autoglm-phone-9b").processor()
    limit_image_tokens(processor, budgets.IMAGE_TOKENS)
    assert image_tokens(processor, (1080, 2400)) == 1219
    limit_image_tokens(processor, None)
    assert image_tokens(processor, budgets.workload(small=False).image_size) == 1219
