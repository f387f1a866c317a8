"""The workbench: loading, attaching, and the surfaces it shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.engine.messages import read_messages
from autoglm_lab.errors import LoadError, PolicyError
from autoglm_lab.models.catalog import TINY_FOLDER


@pytest.fixture
def wb() -> lab.Workbench:
    with lab.load("autoglm-tiny", device="cpu") as workbench:
        yield workbench


def test_greedy_tokens_equal_plain_generate_with_every_setting_of_both(wb: lab.Workbench) -> None:
    question = [{"role": "user", "content": "你是谁? What can you do?"}]
    settings = {"repetition_penalty": 1.3, "min_new_tokens": 40, "max_new_tokens": 60}
    wb.engine.submit(question, **settings).result(60)
    held = wb.engine.state.conversations.get("main").kv.ids
    batch = wb.processor.apply_chat_template(
        [message.for_processor() for message in read_messages(question)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    generated = wb.model.generate(**batch, do_sample=False, **settings)[0].tolist()
    assert len(generated) > len(batch["input_ids"][0]) + 30
    # The last token was chosen, not read.
    assert held == generated[:-1]


def test_a_policy_given_at_loading_holds_from_the_start() -> None:
    policy = lab.MemoryPolicy(modules={"audio": "off", "vision": "on-demand"})
    with lab.load("autoglm-tiny", device="cpu", policy=policy) as wb:
        assert {name: wb.modules[name].info.place for name in ("vision", "audio", "text")} == {
            "vision": "disk",
            "audio": "disk",
            "text": "device",
        }
        assert wb.policy == policy


def test_a_policy_for_another_model_is_refused_and_nothing_stays() -> None:
    with pytest.raises(PolicyError, match="this model has no module 'smell'; its modules are vision, audio"):
        lab.load("autoglm-tiny", device="cpu", policy=lab.MemoryPolicy(modules={"smell": "off"}))


def test_a_policy_can_be_chosen_at_loading() -> None:
    workload = lab.Workload(context=2048, images=1)
    with lab.load("autoglm-tiny", device="cpu", policy="auto", budget="2GiB", workload=workload) as wb:
        assert wb.policy == lab.MemoryPolicy(budget="2GiB")
        assert any("Nothing is given up" in event.why for event in wb.events if event.kind == "policy")
        plan = lab.plan(wb, "auto", context=2048, images=1)
        assert plan.policy == wb.policy
        assert plan.why.startswith("Chosen: the settings as they are")
        assert plan.why.splitlines()[1] in str(plan)


def test_where_no_policy_fits_loading_is_refused_with_what_would_help() -> None:
    with pytest.raises(LoadError, match=r"(?s)autoglm-tiny, 8,192 tokens read.*No policy fits 20\.0 MiB.*One change"):
        lab.load("autoglm-tiny", device="cpu", policy="auto", budget="20MiB")


def test_a_word_that_is_no_policy_is_refused() -> None:
    with pytest.raises(PolicyError, match="a policy is a MemoryPolicy or 'auto', not 'best'"):
        lab.load("autoglm-tiny", device="cpu", policy="best")


def test_a_policy_chosen_for_a_card_holds_that_card() -> None:
    assert lab.plan("autoglm-phone-9b", "auto", device="RTX 4090", context=2048).policy.budget == round(23.6 * 2**30)


def test_a_budget_that_the_weights_do_not_fit_is_refused_at_loading() -> None:
    with pytest.raises(lab.OutOfMemoryError, match="out of memory in load: needed"):
        lab.load("autoglm-tiny", device="cpu", policy=lab.MemoryPolicy(budget="1MiB"))


def test_an_unknown_source_lists_what_there_is() -> None:
    with pytest.raises(LoadError, match="autoglm-tiny"):
        lab.load("autoglm-huge", device="cpu")


def test_attaching_gives_the_same_controls_and_the_same_answers(wb: lab.Workbench) -> None:
    from autoglm_lab.models.autoglm import AutoGlmForConditionalGeneration, AutoGlmProcessor

    model = AutoGlmForConditionalGeneration.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    weight = model.model.language_model.embed_tokens.weight
    with lab.attach(model, AutoGlmProcessor.from_pretrained(TINY_FOLDER)) as attached:
        assert attached.model is model
        assert attached.model.model.language_model.embed_tokens.weight is weight
        expected = wb.chat("Who are you?").result(60).text
        assert attached.chat("Who are you?").result(60).text == expected
        attached.modules["text"].park()
        assert attached.modules["text"].info.place == "disk"
        assert attached.chat("Who are you?", conversation="woken").result(60).text == expected


def test_it_shows_its_ledger_as_text_and_as_html(wb: lab.Workbench) -> None:
    shown = repr(wb)
    assert shown.startswith("autoglm-tiny · float32 · in this kernel")
    assert "unattributed" in shown
    html = wb._repr_html_()
    assert "<svg" in html
    assert "<script" not in html
    assert repr(wb.modules["vision"]).endswith("float32, on device")


def test_the_policy_of_a_dashboard_can_be_taken_away(wb: lab.Workbench, tmp_path: Path) -> None:
    wb.policy = wb.policy.replace(modules={"audio": "off"}, kv={"max_tokens": 512}, budget="8GiB")
    file = tmp_path / "policy.yaml"
    file.write_text(wb.policy.to_yaml())
    assert lab.MemoryPolicy.from_yaml(file) == wb.policy
    statement, before = wb.policy.to_python(), wb.policy
    wb.policy = lab.MemoryPolicy()
    exec(statement, {"wb": wb, "lab": lab})
    assert wb.policy == before


def test_the_article_model_runs_with_made_up_weights_of_its_shape() -> None:
    from autoglm_lab.models.catalog import preset

    config = preset("autoglm-article").config()
    config.text_config.num_hidden_layers = 1
    config.text_config.vocab_size = 2048
    with lab.load(config, weights="dummy", dtype="bfloat16", device="cpu") as wb:
        assert wb.modules["text"].info.dtype == "bfloat16"
        assert any("made up" in event.subject for event in wb.events)
        assert wb.memory.nbytes("text") > 400_000_000


def test_a_module_that_is_not_there_is_not_in_the_modules(wb: lab.Workbench) -> None:
    assert "vision" in wb.modules
    assert "KV main" not in wb.modules


def test_without_peft_fine_tuning_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with lab.load("autoglm-tiny", device="cpu") as wb, pytest.raises(lab.LabError, match=r"autoglm-lab\[train\]"):
        wb.finetune([], steps=1)
