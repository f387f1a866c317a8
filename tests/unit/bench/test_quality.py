"""What lossy settings cost is counted rightly: shares, intervals, perplexities, windows that really cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import autoglm_lab as lab
from autoglm_lab import cli
from autoglm_lab.bench import heldout
from autoglm_lab.bench import perplexity as texts
from autoglm_lab.bench.agreement import agreement, readings
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.heldout import Outcome, Recipe, answered, wilson
from autoglm_lab.bench.lossy_settings import ANSWERED, Setting, opened
from autoglm_lab.bench.quality import run
from autoglm_lab.bench.stock import Stock
from autoglm_lab.errors import LabError
from autoglm_lab.workbench import Workbench


@pytest.fixture(scope="module")
def workbench() -> Iterator[Workbench]:
    torch.set_num_threads(1)
    with lab.load("autoglm-tiny", device="cpu") as found:
        yield found


@pytest.fixture
def ids(workbench: Workbench) -> tuple[int, ...]:
    found = texts.contexts(workbench.processor.tokenizer, texts.documentation(), 160)
    return found[3]


def with_kv(workbench: Workbench, **kv: object) -> None:
    workbench.policy = lab.MemoryPolicy(kv={"prefix_bytes": 0, **kv})


def test_a_share_has_wilsons_interval() -> None:
    assert wilson(50, 100) == pytest.approx((40.38, 59.62), abs=0.01)
    assert wilson(10, 10) == pytest.approx((72.25, 100.0), abs=0.01)
    assert wilson(0, 10) == pytest.approx((0.0, 27.75), abs=0.01)


def test_outcomes_are_compared_dialogue_by_dialogue() -> None:
    no = (False,) * 4
    before = Outcome((True, True, False, False), no, no)
    after = Outcome((True, False, True, True), no, no)
    assert after.against(before) == (1, 2)
    assert after.share == 75.0


def test_costs_of_the_engines_steps_are_those_of_one_plain_forward(workbench: Workbench, ids: tuple[int, ...]) -> None:
    with_kv(workbench)
    hooks = len(workbench.model.get_decoder()._forward_hooks)
    ours = texts.losses(workbench, ids, chunk=48)
    stock = Stock(workbench).model
    with torch.no_grad():
        logits = stock(input_ids=torch.tensor([ids])).logits[0]
    plain = functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]), reduction="none")
    assert torch.allclose(ours, plain, atol=1e-3)
    chunked = texts.stock_losses(stock, DynamicCache(config=stock.config), ids, chunk=48)
    assert torch.allclose(chunked, plain, atol=1e-3)
    assert not workbench.engine.state.pool.used_pages
    assert len(workbench.model.get_decoder()._forward_hooks) == hooks


def test_codes_in_the_pages_cost_something(workbench: Workbench, ids: tuple[int, ...]) -> None:
    costs = {}
    for precision in ("model", "int8", "int4"):
        with_kv(workbench, precision=precision)
        costs[precision] = texts.losses(workbench, ids, chunk=48)
    apart = {name: float((cost - costs["model"]).abs().mean()) for name, cost in costs.items()}
    assert 0 < apart["int8"] < apart["int4"]


def test_a_window_costs_only_where_it_has_forgotten(workbench: Workbench, ids: tuple[int, ...]) -> None:
    with_kv(workbench)
    all_kept = texts.losses(workbench, ids, chunk=16)
    cut = texts.losses(workbench, ids, window=(64, 16), chunk=16)
    assert torch.allclose(cut[:64], all_kept[:64], atol=1e-3)
    assert not torch.allclose(cut[64:], all_kept[64:], atol=1e-2)


def test_a_change_of_perplexity_is_that_of_the_same_contexts() -> None:
    before = [torch.full((10,), 2.0), torch.full((10,), 3.0)]
    same, interval = texts.change(before, before)
    assert same == 0.0
    assert interval == (0.0, 0.0)
    more, (low, high) = texts.change([one + 0.01 for one in before], before)
    assert low == pytest.approx(more, abs=1e-4)
    assert more == pytest.approx(
        100 * (texts.perplexity([one + 0.01 for one in before]) / texts.perplexity(before) - 1)
    )
    assert high >= more


def test_a_text_too_short_for_one_context_is_refused(workbench: Workbench) -> None:
    with pytest.raises(LabError, match="one context takes 1,024"):
        texts.contexts(workbench.processor.tokenizer, "a few words")


def test_dialogues_longer_than_the_window_are_cut_or_refused(workbench: Workbench) -> None:
    recipe = Recipe()
    dialogues = recipe.dialogues("recall", 6)
    with_kv(workbench, reuse=False)
    whole = answered(workbench, recipe, dialogues)
    assert not any(whole.forgot)
    assert not any(whole.refused)
    assert sum(whole.right) >= 5
    with_kv(workbench, reuse=False, **Setting.window(96, 16).kv)
    cut = answered(workbench, recipe, dialogues)
    assert any(cut.forgot)
    assert any(cut.refused)
    assert not any(right and refused for right, refused in zip(cut.right, cut.refused, strict=True))
    assert not workbench.conversations
    with_kv(workbench)


def test_a_setting_is_had_for_a_while_and_taken_back(workbench: Workbench) -> None:
    before = workbench.policy
    with opened(Setting("", {"precision": "int8"}), workbench, "autoglm-tiny", before) as under:
        assert under is workbench
        assert under.policy.kv.precision == "int8"
    assert workbench.policy == before
    with opened(Setting("", weights={"text": "2:4", "head": "int8"}), workbench, "autoglm-tiny", before) as under:
        assert under.policy.precisions() == {"text": "2:4"}  # it has no head of its own
        assert under.memory.nbytes("text") < 0.66 * workbench.memory.nbytes("text")


def test_what_a_setting_leaves_of_the_phone_model_is_counted() -> None:
    found = {setting.name: setting.phone_bytes() for setting in ANSWERED}
    plain = Setting("").phone_bytes()
    assert plain == {"weights": 20_585_554_944, "kv": 8192 * 40_960}
    assert found["KV in int8"] == plain | {"kv": 8192 * 20_800}
    assert found["window of 256 tokens with 64 sinks"]["kv"] == 256 * 40_960
    weights = [found[name]["weights"] / plain["weights"] for name in ("all weights in int8", "text in 2:4")]
    assert weights == pytest.approx([0.5, 0.653], abs=0.01)


def test_distributions_are_those_of_the_engines_own_steps(workbench: Workbench) -> None:
    recipe = Recipe()
    with_kv(workbench)
    dialogue = recipe.dialogues("tap", 1)[0]
    (read,) = readings(workbench, recipe, [dialogue])
    answer = workbench.engine.submit(
        recipe.messages(dialogue), conversation="once", thinking=dialogue.thinking, max_new_tokens=96
    ).result(100)
    workbench.drop("once")
    assert read.answer == answer.usage.completion_tokens
    assert torch.allclose(read.expected.exp().sum(-1), torch.ones(read.answer, dtype=torch.float64))
    same = agreement(workbench, [read])
    assert same.top1 == 100
    assert same.divergence == pytest.approx(0, abs=1e-9)
    greedy = read.expected.argmax(-1).tolist()
    assert tuple(greedy[:-1]) == read.prompt.ids[len(read.prompt.ids) - read.answer + 1 :]


def test_fewer_bits_are_further_apart(workbench: Workbench) -> None:
    recipe = Recipe()
    with_kv(workbench)
    read = readings(workbench, recipe, recipe.dialogues("recall", 2))
    apart = {}
    for precision in ("int8", "int4"):
        with_kv(workbench, precision=precision)
        apart[precision] = agreement(workbench, read)
    with_kv(workbench)
    assert 0 < 10 * apart["int8"].divergence < apart["int4"].divergence
    low, high = apart["int4"].interval
    assert low < apart["int4"].divergence < high
    assert apart["int4"].tokens == sum(one.answer for one in read)


def test_it_runs_small_beside_transformers(tmp_path: Path, workbench: Workbench) -> None:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    workbench.processor.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with Bench(small=True, smollm2=tmp_path, kept=tmp_path / "kept.jsonl", say=lambda _: None) as bench:
        report = run(bench)
    figures = {figure.name: figure for figure in report.figures}
    for task in ("tap", "recall"):
        exact = figures[f"{task}, as the model computes: right"]
        assert exact.ours == exact.peers["transformers"]
        assert exact.interval is not None
        assert figures[f"{task}, KV in int8: right"].peers == {"as the model": exact.ours}
        assert figures[f"{task}, text in int4, head in int8: right"].peers == {"as the model": exact.ours}
    plain = figures["SmolLM2's perplexity, as the model computes"]
    assert plain.ours == pytest.approx(plain.peers["transformers"], rel=1e-4)
    assert "fp8" in figures["SmolLM2's perplexity, KV in int8: higher by"].peers
    costs = [
        figures[f"SmolLM2's perplexity, {setting}: higher by"].ours
        for setting in ("text in int4, head in int8", "text in 2:4")
    ]
    # A model of random weights may gain as well as lose: it shows that other weights were used, not what they cost.
    assert all(0 < abs(cost or 0) < 20 for cost in costs)
    assert costs[0] != costs[1]
    assert 90 < (figures["KV in int4: same likeliest token"].ours or 0) <= 100
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept[0]["run"]["dialogues"] == "8"
    by_name = {entry["setting"]: entry for entry in kept if "tap" in entry}
    assert by_name["text in 2:4"]["weights"] == {"text": "2:4"}
    assert by_name["KV in int4"]["bytes"] == {"weights": 20_585_554_944, "kv": 100 << 20}
    assert "95 %" in str(report)
    assert not report.missed


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heldout, "PROJECT", tmp_path)
    with (
        Bench(small=True, say=lambda _: None) as bench,
        pytest.raises(LabError, match=r"run it from a checkout .*name its folder with --smollm2"),
    ):
        run(bench)


def test_a_folder_without_a_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bench", "quality", "--smollm2", str(tmp_path)])
    assert isinstance(result.exception, LabError)
    assert "it has no config.json" in str(result.exception)
