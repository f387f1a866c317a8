"""What lossy settings cost is counted rightly: shares, intervals, perplexities, windows that really cut."""

from __future__ import annotations

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
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.heldout import Outcome, Recipe, answered, wilson
from autoglm_lab.bench.quality import Setting, run
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


def test_it_runs_small_beside_transformers(tmp_path: Path, workbench: Workbench) -> None:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    workbench.processor.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with Bench(small=True, smollm2=tmp_path, say=lambda _: None) as bench:
        report = run(bench)
    figures = {figure.name: figure for figure in report.figures}
    for task in ("tap", "recall"):
        exact = figures[f"{task}, as the model computes: right"]
        assert exact.ours == exact.peers["transformers"]
        assert exact.interval is not None
        assert figures[f"{task}, int8: right"].peers == {"as the model": exact.ours}
        assert figures[f"{task}, weights in int4: right"].peers == {"as the model": exact.ours}
    plain = figures["SmolLM2's perplexity, as the model computes"]
    assert plain.ours == pytest.approx(plain.peers["transformers"], rel=1e-4)
    assert "fp8" in figures["SmolLM2's perplexity, int8: higher by"].peers
    in_8_bits, in_4_bits = (figures[f"SmolLM2's perplexity, weights in int{bits}: higher by"] for bits in (8, 4))
    # A model of random weights may gain as well as lose: it shows that codes were used, not which of them are better.
    assert 0 < abs(in_8_bits.ours or 0) < 1
    assert 0 < abs(in_4_bits.ours or 0) < 10
    assert in_8_bits.ours != in_4_bits.ours
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
