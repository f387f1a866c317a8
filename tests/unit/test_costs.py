"""The costs beside the switches are those that were measured, and stand in the docs as they stand in the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoglm_lab import costs
from autoglm_lab.bench.costs_page import PAGE, merged, page
from autoglm_lab.bench.lossy_settings import ANSWERED

MEASURED = {
    "KV in int4": {
        "tap": {"before": 98.0, "share": 97.25},
        "recall": {"before": 99.0, "share": 98.5},
        "top1": 99.93,
        "perplexity": {"more": 5.864},
    },
    "text in 2:4": {"top1": 97.09, "perplexity": {"more": 43495.0}},
    "window of 256 tokens with 64 sinks": {
        "kv": {"max_tokens": 256},
        "tap": {"before": 98.0, "share": 98.0},
        "recall": {"before": 99.0, "share": 79.3},
    },
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "costs", lambda: {"settings": MEASURED})


@pytest.mark.usefixtures("measured")
def test_a_cost_reads_like_a_sentence_in_both_languages() -> None:
    told = "tap 98.0 → 97.2 %, recall 99.0 → 98.5 %, same next token 99.9 %, SmolLM2 perplexity +5.9 %"
    assert costs.cost_of("kv int4") == told
    told = "点击 98.0 → 97.2 %，回忆 99.0 → 98.5 %，下一词元相同 99.9 %，SmolLM2 困惑度 +5.9 %"
    assert costs.cost_of("kv int4", "zh") == told


@pytest.mark.usefixtures("measured")
def test_what_collapses_is_told_as_a_factor() -> None:
    assert costs.cost_of("weights 2:4") == "same next token 97.1 %, SmolLM2 perplexity x 436"


@pytest.mark.usefixtures("measured")
def test_what_forgets_says_at_which_limit() -> None:
    assert costs.cost_of("kv window") == "at 256 tokens: tap 98.0 → 98.0 %, recall 99.0 → 79.3 %"


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("switch", ["kv model", "kv stop", "kv int8", "weights model"])
def test_what_loses_nothing_or_was_not_measured_is_not_told(switch: str) -> None:
    assert costs.cost_of(switch) == ""


@pytest.mark.parametrize("switch", ["kv int8", "kv int4", "kv window", "weights int8", "weights int4", "weights 2:4"])
def test_every_lossy_switch_has_its_cost(switch: str) -> None:
    assert costs.cost_of(switch)
    assert costs.SETTINGS[switch] in {setting.name for setting in ANSWERED}


def test_the_page_for_people_has_what_the_dashboard_shows() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(costs.costs())


def test_of_several_runs_the_later_one_counts(tmp_path: Path) -> None:
    def kept(name: str, *entries: object) -> Path:
        (tmp_path / name).write_text("\n".join(json.dumps(entry) for entry in entries))
        return tmp_path / name

    first = kept(
        "a", {"run": {"date": "1", "command": "a"}}, {"setting": "x", "top1": 1.0}, {"setting": "y", "top1": 2.0}
    )
    second = kept("b", {"run": {"date": "2", "command": "b"}}, {"setting": "x", "top1": 3.000000004}, {"peer": "hqq"})
    third = kept("c", {"setting": "x", "perplexity": {"more": 0.5}})
    found = merged([first, second, third])
    assert found == {
        "run": {"commands": ["a", "b"], "date": "2"},
        "settings": {"x": {"top1": 3.0, "perplexity": {"more": 0.5}}, "y": {"top1": 2.0}},
    }
