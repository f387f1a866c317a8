"""The plan's bench runs small: each row in a process of its own, beside its prediction."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autoglm_lab.bench import plan, plan_rows
from autoglm_lab.bench.bench import Bench, wanted
from autoglm_lab.bench.plan import Outcome, Plans, landing
from autoglm_lab.bench.plan_models import FAMILIES, made_up_processor
from autoglm_lab.bench.plan_rows import GEMMA, PHONE, QWEN, Setting
from autoglm_lab.bench.plan_worker import measure
from autoglm_lab.bench.prompts import length, screen, user
from autoglm_lab.engine.messages import read_messages
from autoglm_lab.errors import LabError
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB, MiB


def rows_with(words: str) -> list[Setting]:
    return [row for row in plan_rows.small() if wanted(row.name, words)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    torch.set_num_threads(1)
    with Bench(small=True, rows="512 tokens", kept=tmp_path / "rows.jsonl", say=lambda _: None) as session:
        yield session


def outcome(row: Setting, **measured: Any) -> Outcome:
    told = {"outcome": "done", "total": 1000, "rest": 100, "process": 900, "hidden": False}
    return Outcome(row, 1000, 100, None, told | measured)


def test_a_row_is_measured_in_a_process_of_its_own_and_written_at_once(bench: Bench, tmp_path: Path) -> None:
    report = plan.run(bench)
    (told,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert told["row"]["name"] == "tiny, 512 tokens"
    assert told["measured"]["outcome"] == "done"
    assert told["measured"]["phases"].keys() >= {"prefill", "decode"}
    assert told["predicted"] > told["predicted_rest"] > 0
    assert told["estimate_memory"] == pytest.approx(23.6e6, rel=0.05)
    figure = report.figures[0]
    assert figure.peers == {"measured": told["measured"]["total"], "estimate-memory": told["estimate_memory"]}
    assert figure.meets is None, "a small run judges no bar"
    assert report.figures[-1].name == "largest error of the rest"


@pytest.mark.parametrize("words", ["qwen, narrow", "gemma, narrow"])
def test_families_that_have_no_processor_here_answer(words: str) -> None:
    (row,) = rows_with(words.split(",", maxsplit=1)[0])
    told = measure(row)
    assert told["outcome"] == "done"
    assert told["phases"].keys() >= {"encode", "prefill", "decode"}
    predicted, _ = Plans(Bench(small=True, say=lambda _: None)).of(row)
    assert predicted["encode"].of("activations") > 0
    assert not [note for note in predicted.notes if "could not be traced" in note]


def test_a_prompt_is_as_long_as_its_row_says_images_included() -> None:
    (row,) = rows_with("qwen")
    config = FAMILIES[QWEN](small=True)
    processor = made_up_processor(config)
    asked = [user("x", *(screen(seed, *row.image_size) for seed in range(row.images)))]
    batch = processor.apply_chat_template([message.for_processor() for message in read_messages(asked)])
    assert length(SimpleNamespace(processor=processor), asked) == batch["input_ids"].shape[1] > 16  # type: ignore[arg-type]


def test_a_budget_that_is_too_small_is_an_outcome() -> None:
    (row,) = rows_with("too small")
    told = measure(row)
    assert told["outcome"] == "out of memory"
    assert outcome(row, **told).meets is True


def test_there_are_enough_rows_and_each_has_a_name_of_its_own() -> None:
    rows = plan_rows.accuracy()
    assert len(rows) >= 30
    assert len({row.name for row in rows}) == len(rows)
    assert {row.model for row in rows} == {PHONE, "autoglm-article", QWEN, GEMMA}
    assert all(row == Setting.from_dict(json.loads(json.dumps(row.to_dict()))) for row in rows)
    assert [row.name for row in rows if wanted(row.name, "window, float16")] == [
        "phone, 4,096 tokens, float16",
        "phone, 8,192 tokens in a window of 4,096",
    ]


@pytest.mark.parametrize(
    ("measured", "meets"),
    [
        ({"total": 985}, True),
        ({"total": 975}, False),
        ({"total": 1009}, True),
        ({"total": 1011}, False),
        ({"rest": 94}, False),
        ({"outcome": "failed"}, False),
        ({"hidden": True}, None),
    ],
)
def test_a_row_meets_its_bar_or_not(measured: dict[str, Any], meets: bool | None) -> None:
    assert outcome(Setting("a row", PHONE, 512), **measured).meets is meets


def test_a_budget_is_to_be_held_or_broken() -> None:
    row = Setting("a cap", PHONE, 512, settings={"budget": 1000}, expected=True)
    assert outcome(row).meets is True
    assert outcome(row, process=1001).meets is False
    assert outcome(row, outcome="out of memory").meets is False
    above = replace(row, expected=False)
    assert outcome(above, outcome="out of memory").meets is True
    assert outcome(above).meets is False


def test_a_training_is_measured_as_a_row() -> None:
    (row,) = rows_with("train")
    told = measure(row)
    assert told["outcome"] == "done"
    assert told["process"] > told["context"]
    predicted, _ = Plans(Bench(small=True, say=lambda _: None)).of(row)
    assert [phase.name for phase in predicted.phases] == ["load", "train"]
    assert predicted["train"].of("optimiser states") > 0
    kinds = {one.settings["training"]["checkpointing"] for one in plan_rows.accuracy() if one.train}
    assert kinds == {"none", "every-k", "every-layer"}


def test_rows_are_predicted_where_there_is_no_gpu_and_compared_where_there_is(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "there.json"
    with Bench(small=True, predict_only=True, rows="512 tokens", say=lambda _: None) as session:
        foretold = plan.run(session)
    (figure,) = foretold.figures
    file.write_text(json.dumps({"reports": {"plan": foretold.to_dict()}}))
    assert figure.ours is not None
    assert plan.read_predicted(file) == {"tiny, 512 tokens": figure.ours}
    monkeypatch.setattr(plan, "_measured", lambda row: dict(outcome(row).measured))
    bench.predicted = file
    assert plan.run(bench).figures[-1].ours == 0
    file.write_text(json.dumps({"reports": {"plan": {"figures": [{"name": "tiny, 512 tokens", "ours": 1000}]}}}))
    apart = plan.run(bench).figures[-1]
    assert apart.name == "largest difference from 1 predictions made without a GPU"
    assert apart.ours == pytest.approx(100 * (figure.ours / 1000 - 1))
    file.write_text("{}")
    with pytest.raises(LabError, match=r"holds no predictions \(KeyError\): .*--predict-only --json FILE"):
        plan.run(bench)


def test_without_a_gpu_true_sizes_are_predicted_for_the_card_that_they_were_measured_on() -> None:
    with Bench(predict_only=True, say=lambda _: None) as session:
        assert not session.small
        assert plan._where(session).name == ("H200" if not session.cuda else plan._where(session).name)
    if not torch.cuda.is_available():
        with pytest.raises(LabError, match="a full run needs a GPU"):
            Bench(small=False)


def test_prompts_land_just_below_and_above_a_cap(bench: Bench) -> None:
    predict = Plans(bench).planner("autoglm-tiny", "auto")
    policy = MemoryPolicy()

    def needed(context: int) -> int:
        return predict.plan(policy, Workload(context, 8), search=False).largest.needed

    target = (needed(256) + needed(4000)) // 2
    below, above = (landing(predict, policy, target, above=over) for over in (False, True))
    assert below is not None and above is not None
    assert needed(below) <= target < needed(above)
    assert 0 < above - below <= 64
    assert landing(predict, policy, 1 * MiB, above=False) is None
    assert landing(predict, policy, 999 * GiB, above=True) is None


@pytest.mark.parametrize(("model", "tokens"), [(QWEN, 24 * 52 + 2), (GEMMA, 256 + 2)])
def test_an_image_takes_the_familys_tokens(model: str, tokens: int) -> None:
    from autoglm_lab.bench.prompts import screen

    processor = made_up_processor(FAMILIES[model](small=False))
    content = [{"type": "image", "image": screen(0, 672, 1456)}, {"type": "text", "text": "hi"}]
    batch = processor.apply_chat_template([{"role": "user", "content": content}])
    assert batch["input_ids"].shape[1] == tokens + len("hi\n")
