"""Forgetting by attention is measured beside forgetting by age, at the same limit, by what was read alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import autoglm_lab as lab
from autoglm_lab.bench import evict
from autoglm_lab.bench import perplexity as texts
from autoglm_lab.bench.bench import Bench
from autoglm_lab.errors import LabError
from autoglm_lab.memory.kv.eviction import Eviction
from autoglm_lab.workbench import Workbench


@pytest.fixture
def workbench() -> Iterator[Workbench]:
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    with lab.attach(model) as found:
        found.policy = lab.MemoryPolicy(kv={"prefix_bytes": 0})
        yield found


def test_an_eviction_costs_only_where_it_has_forgotten(workbench: Workbench) -> None:
    ids = tuple(torch.randint(1, 128, (160,)).tolist())
    kept = texts.losses(workbench, ids, chunk=16)
    cut = texts.losses(workbench, ids, eviction=Eviction(64, 16, 8), chunk=16)
    assert cut.shape == kept.shape == (159,)
    assert torch.allclose(cut[:63], kept[:63], atol=1e-4)
    assert not torch.allclose(cut[64:], kept[64:], atol=1e-4)
    assert not workbench.engine.state.pool.used_pages  # type: ignore[union-attr]


def test_what_is_kept_does_not_depend_on_what_is_to_be_foretold(workbench: Workbench) -> None:
    ids = tuple(torch.randint(1, 128, (160,)).tolist())
    other = (*ids[:96], *reversed(ids[96:]))
    one, two = (texts.losses(workbench, text, eviction=Eviction(64, 16, 8), chunk=16) for text in (ids, other))
    assert torch.equal(one[:95], two[:95])
    assert not torch.equal(one[96:], two[96:])


def test_a_prompt_that_is_cut_once_is_cut_to_the_same_for_both(workbench: Workbench) -> None:
    ids = tuple(torch.randint(1, 128, (evict.READ + evict.THEN,)).tolist())
    whole, window, evicted = (
        evict._ours_after(workbench, ids, way)
        for way in ({}, {"window": (evict.READ, 16)}, {"eviction": Eviction(evict.READ, 16, 32)})
    )
    with torch.no_grad():
        logits = workbench.model(input_ids=torch.tensor([ids])).logits[0, evict.READ : -1]
    plain = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[evict.READ + 1 :]), reduction="none")
    assert torch.allclose(whole, plain, atol=1e-3)
    assert whole.shape == window.shape == evicted.shape
    assert not torch.allclose(window, evicted, atol=1e-4)


def test_without_a_folder_of_smollm2_recalls_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evict, "LIMITS", ((128, 16),))
    with Bench(small=True, dialogues=2, say=lambda _: None) as bench:
        report = evict.run(bench)
    (figure,) = report.figures
    assert figure.name == "recall, 128 tokens with 16 sinks: right"
    assert set(figure.peers) == {"window", "all kept"}
    assert "Left out: SmolLM2's perplexity needs its folder" in report.notes[-1]


def test_with_nothing_to_measure_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("autoglm_lab.bench.heldout.PROJECT", tmp_path)
    with Bench(small=True, say=lambda _: None) as bench, pytest.raises(LabError, match="--smollm2"):
        evict.run(bench)
