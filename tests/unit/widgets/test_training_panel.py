from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.policy import MemoryPolicy, TrainingPolicy
from autoglm_lab.samples import SAMPLES
from autoglm_lab.training.loop import latest
from autoglm_lab.training.run import RunState, TrainingRun
from autoglm_lab.widgets.labels import LANGS, labels_of
from autoglm_lab.widgets.training_panel import peaks_of, run_state, thinned, training_state
from tests.unit.widgets.browser import browser_sends, until

WAIT = 120
SMALL: dict[str, Any] = {"rank": 4, "alpha": 8.0, "warm_up": 1, "steps": 4}


def dialogues() -> list[dict[str, Any]]:
    sample = SAMPLES[0]
    content = [{"type": "image", "image": str(sample.image)}, {"type": "text", "text": sample.prompt["en"]}]
    answer = {"role": "assistant", "content": '<answer>finish(message="brown")</answer>'}
    return [{"messages": [{"role": "user", "content": content}, answer]}] * 4


@pytest.fixture(scope="module")
def trained() -> Iterator[lab.Workbench]:
    """A model of its own: other tests expect theirs as it was loaded."""
    torch.set_num_threads(1)
    with lab.load("autoglm-tiny", device="cpu") as workbench:
        yield workbench


@pytest.fixture
def wb(trained: lab.Workbench) -> Iterator[lab.Workbench]:
    yield trained
    trained.policy = MemoryPolicy()
    if trained.adapters:
        trained.tuner.remove()


@pytest.fixture
def small_batches(wb: lab.Workbench) -> None:
    wb.policy = MemoryPolicy(training={"micro_batch": 1, "accumulation": 1})


def test_it_is_folded_while_nothing_was_trained_and_does_not_make_a_tuner_to_know(wb, dashboard, monkeypatch):
    asked: list[lab.Workbench] = []
    monkeypatch.setattr(wb, "_tuner", None)
    monkeypatch.setattr(type(wb), "tuner", property(asked.append))
    state = training_state(wb, dashboard._last)
    assert (state["run"], state["adapters"], state["active"]) == (None, [], False)
    assert asked == [], "a tuner imports the libraries of training"


def test_a_workbench_without_a_tuner_has_no_such_panel(dashboard):
    class Elsewhere:
        policy = MemoryPolicy()

    assert training_state(Elsewhere(), dashboard._last) == {"hidden": True}
    assert "hidden" not in dashboard.training.state


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("checkpointing", "every-k"),
        ("every", 3),
        ("offload", 0.5),
        ("loss_chunk", 128),
        ("optimizer", "adamw-8bit"),
        ("micro_batch", 2),
        ("accumulation", 8),
        ("cache_features", False),
    ],
)
def test_every_control_reaches_its_setting_and_no_other(wb, dashboard, setting, value):
    browser_sends(dashboard.training, "set", setting=setting, value=value)
    until(lambda: wb.policy != MemoryPolicy(), "the setting")
    assert wb.policy == MemoryPolicy(training={setting: value})
    until(lambda: dashboard.training.state["settings"][setting] == value, "the panel to show it")


def test_there_is_a_control_for_every_setting(dashboard):
    assert all(f'"{name}"' in dashboard.training._esm for name in TrainingPolicy.model_fields)


def test_a_training_is_begun_from_the_panel(wb, dashboard, small_batches, tmp_path):
    panel, data = dashboard.training, tmp_path / "train.jsonl"
    data.write_text("\n".join(["nothing", *map(json.dumps, dialogues())]), encoding="utf-8")
    asked = {"data": str(data), "method": "lora", "rank": "4", "epochs": "0.5", "out": str(tmp_path / "run")}
    before = wb.training
    browser_sends(panel, "begin", asked=asked | {"budget": "100GiB"})
    until(lambda: wb.training is not before, "the training", WAIT)
    wb.training.result(WAIT)
    until(lambda: (panel.state["run"] or {}).get("state") == "done" and panel.state["adapters"], "its end", WAIT)
    shown = panel.state["run"]
    assert (shown["steps"], shown["left_out"]) == (2, 1)
    assert shown["problems"][0].startswith("line 1: it is not JSON")
    assert wb.policy.budget == 100 << 30
    assert panel.state["budget"] == "100.00 GiB"
    assert latest(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    assert not panel.problem


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "name a file to learn from"),
        ({"data": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        ({"data": "bad.jsonl"}, "bad.jsonl has no dialogue to learn from; line 1: it has no list 'messages'"),
        ({"data": "bad.jsonl", "rank": "many"}, "rank is a number (got 'many')"),
        ({"data": "bad.jsonl", "budget": "plenty"}, "plenty"),
    ],
)
def test_what_cannot_be_begun_is_told_and_names_the_line(wb, dashboard, tmp_path, monkeypatch, asked, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{}\n", encoding="utf-8")
    before = wb.training
    browser_sends(dashboard.training, "begin", asked=asked)
    until(lambda: said in dashboard.training.problem, "the error", WAIT)
    assert wb.training is before


def test_a_training_is_stopped_and_resumed_from_the_panel(wb, dashboard, small_batches, tmp_path):
    panel = dashboard.training

    def stop_from_the_panel(run: TrainingRun) -> None:
        if run.step == 2:
            browser_sends(panel, "stop")

    run = wb.finetune(dialogues(), out=tmp_path / "run", watch=stop_from_the_panel, **SMALL)
    assert run.result(60).stopped
    until(lambda: (panel.state["run"] or {}).get("state") == "stopped", "the panel to show it")
    shown = panel.state["run"]
    assert (shown["step"], shown["steps"], shown["ended"], shown["resumable"]) == (2, 4, True, True)
    assert shown["curve"] == [[step, loss] for step, loss in run.losses]
    assert shown["peaks"] == peaks_of(run)
    assert shown["rate"] == round(run.tokens / run.seconds)
    assert (panel.state["active"], panel.state["adapters"]) == (True, ["default"])

    browser_sends(panel, "resume")
    until(lambda: panel.state["run"]["state"] == "done", "the rest")
    assert (panel.state["run"]["step"], panel.state["run"]["resumable"]) == (4, False)
    assert [step for step, _ in panel.state["run"]["curve"]] == [3, 4]
    assert not panel.problem


def test_adapters_are_switched_saved_removed_and_merged(wb, dashboard, small_batches, tmp_path):
    panel = dashboard.training
    wb.finetune(dialogues(), **SMALL | {"steps": 1}).result(60)
    until(lambda: panel.state["adapters"] == ["default"] and panel.state["nbytes"], "the adapter")
    assert panel.state["nbytes"] == wb.tuner.nbytes
    browser_sends(panel, "switch", on=False)
    until(lambda: panel.state["on"] is False, "the switch")
    assert not wb.tuner.on

    browser_sends(panel, "save", folder=" ")
    until(lambda: "name a folder" in panel.problem, "the error")
    browser_sends(panel, "save", folder=str(tmp_path / "mine"))
    until(lambda: panel.state["saved"] == str(tmp_path / "mine"), "the file")
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()
    browser_sends(panel, "save", folder=str(tmp_path / "mine"))
    until(lambda: "exists: give another folder" in panel.problem, "the refusal")

    browser_sends(panel, "remove")
    until(lambda: panel.state["adapters"] == [], "the adapter to go")
    assert (panel.state["active"], panel.state["saved"], panel.state["nbytes"]) == (False, "", 0)
    browser_sends(panel, "merge")
    until(lambda: "there is no adapter to merge" in panel.problem, "the error")


def test_a_merged_adapter_is_gone_and_stays_in_the_weights(small_batches, wb, dashboard):
    before = {name: value.detach().clone() for name, value in wb.model.named_parameters()}
    wb.finetune(dialogues(), **SMALL | {"steps": 2}).result(60)
    until(lambda: dashboard.training.state["adapters"], "the adapter")
    browser_sends(dashboard.training, "merge")
    until(lambda: not dashboard.training.state["adapters"], "the merge")
    after = dict(wb.model.named_parameters())
    assert after.keys() == before.keys()
    changed = {name.split(".")[-2] for name, value in after.items() if not value.equal(before[name])}
    assert {"q_proj", "down_proj"} <= changed


def test_a_failed_training_says_why_and_the_panel_stays_open():
    run = TrainingRun("default", 8)
    run.losses.extend([(1, 2.0), (2, float("nan"))])
    run.tell("failed", "memory ran out")
    state = run_state(run)
    assert (state["state"], state["note"], state["ended"]) == ("failed", "memory ran out", True)
    assert state["loss"] is None and state["curve"] == [[1, 2.0], [2, None]], "what is no number cannot travel"
    assert state["rate"] is None and state["left"] is None


def test_a_long_curve_is_thinned_to_its_means():
    losses = [(step, float(step % 2)) for step in range(1, 1001)]
    points = thinned(losses, most=100)
    assert len(points) == 100
    assert points[0] == [10, 0.5] and points[-1] == [1000, 0.5]
    assert thinned(losses[:3], most=100) == [[1, 1.0], [2, 0.0], [3, 1.0]]
    assert thinned([]) == []


def test_words_made_up_at_run_time_exist_in_both_languages():
    fields = TrainingPolicy.model_fields
    keys = [f"state {state}" for state in (*get_args(RunState), "stopping")]
    keys += [f"peak {phase}" for phase in ("encode", "forward", "backward")]
    keys += [f"{what}{word}" for what in ("save", "merge", "remove") for word in ("", " hint")]
    keys += [f"{what} sure" for what in ("merge", "remove")]
    keys += [f"{name} hint" for name in ("data", "rank", "epochs", "budget", "out", "method lora", "method full")]
    for setting in ("checkpointing", "optimizer"):
        for value in get_args(fields[setting].annotation):
            keys += [f"{setting} {value}", f"{setting} {value} hint"]
    keys += [f"{setting} hint" for setting in ("every", "offload", "loss_chunk", "micro_batch", "accumulation")]
    for lang in LANGS:
        assert set(keys) <= labels_of("training_panel", lang).keys()
