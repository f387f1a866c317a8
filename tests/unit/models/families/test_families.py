"""Every family that was tried: attached it answers as the plain model does, and detached it is that model again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import autoglm_lab as lab
from tests.unit.models.families import audio, grids, text, vision
from tests.unit.models.families.exercise import exercise
from tests.unit.models.families.family import Family

FAMILIES = (*text.FAMILIES, *vision.FAMILIES, *grids.FAMILIES, *audio.FAMILIES)
TABLE = Path(__file__).parents[4] / "docs" / "models.md"


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> Iterator[None]:
    """Opening an accelerator collects garbage, which takes long beside all that transformers has imported."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_attached_model_answers_as_before_and_is_given_back_as_it_was(family: Family) -> None:
    outcome = exercise(family)
    assert outcome.asked == outcome.plain
    assert outcome.changed == []
    assert outcome.modules == family.modules
    assert outcome.row in TABLE.read_text(encoding="utf-8").splitlines()


def test_sliding_layers_go_on_from_the_last_turn_and_begin_anew_where_it_was_another() -> None:
    family = next(family for family in FAMILIES if family.name == "Mistral, sliding")
    policy = lab.MemoryPolicy(generation={"max_new_tokens": 6, "eos": False})
    with lab.attach(family.build(), family.processor(), policy=policy) as wb:
        first = wb.chat("some words to begin with").result(60)
        second = wb.chat("and more").result(60)
        assert second.usage.cached_tokens == first.usage.prompt_tokens + 5
        question = [{"role": "user", "content": "some words of another kind"}]
        assert wb.engine.submit(question, replace=True).result(60).usage.cached_tokens == 0


def test_the_table_has_no_row_of_a_family_that_is_not_tried() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.count("|") == 6]
    assert len(rows) == len(FAMILIES) + 2
