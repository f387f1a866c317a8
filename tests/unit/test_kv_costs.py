"""The costs beside the switches are those that were measured, and every lossy setting has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_lab.kv_costs import COMMAND, COSTS, DATE, cost_of

DOCS = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
SECTION = DOCS.partition("## What lossy settings cost")[2].partition("\n## ")[0]


def test_a_cost_reads_like_a_sentence_in_both_languages() -> None:
    assert cost_of("int4") == "tap 97.7 → 98.0 %, recall 99.2 → 98.8 %, SmolLM2 perplexity +5.9 %"
    assert cost_of("int4", "zh") == "点击 97.7 → 98.0 %，回忆 99.2 → 98.8 %，SmolLM2 困惑度 +5.9 %"


@pytest.mark.parametrize("setting", ["model", "stop", "drop-oldest-turns", "refuse"])
def test_a_lossless_setting_costs_nothing(setting: str) -> None:
    assert cost_of(setting) == ""


@pytest.mark.parametrize("setting", ["int8", "int4", "window"])
def test_a_lossy_settings_figures_stand_in_the_docs_with_their_command(setting: str) -> None:
    assert COMMAND in SECTION
    assert DATE in SECTION
    rows = [line for line in SECTION.splitlines() if line.startswith("|") and setting in line]
    for cost in COSTS[setting]:
        figures = [figure for figure in (cost.before, cost.after) if figure is not None]
        assert any(all(f"{figure:g} %" in row for figure in figures) for row in rows), cost
