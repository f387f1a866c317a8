from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import autoglm_lab as lab
from autoglm_lab.errors import DatasetError, ModuleOffError, OutOfMemoryError, TrainingError
from autoglm_lab.memory.high_water import high_water
from autoglm_lab.training.dataset import Dataset
from autoglm_lab.training.loop import checkpoints, latest
from autoglm_lab.training.run import TrainingRun, curve
from autoglm_lab.training.step import Step
from autoglm_lab.units import format_bytes
from tests.unit.training.conftest import weights

SMALL: dict[str, Any] = {"rank": 4, "alpha": 8.0, "learning_rate": 5e-3, "warm_up": 1, "seed": 1}
WAIT = 60
pytestmark = pytest.mark.usefixtures("small_batches")


def test_training_lowers_the_loss_and_the_model_answers_with_what_it_learnt(wb: lab.Workbench, data: Dataset) -> None:
    before = wb.chat("Hi", conversation="before").result().text
    seen: list[tuple[str, frozenset[str], str]] = []
    phases = set()

    def watch(run: TrainingRun) -> None:
        if run.state == "training" and run.step:
            rows = frozenset(row.name for row in wb.memory.rows if row.nbytes)
            seen.append((wb.modules["vision"].info.place, rows, wb.engine.phase))
            phases.update(run.activations)

    run = wb.finetune(data, steps=8, watch=watch, **SMALL)
    result = run.result(WAIT)

    assert (result.steps, result.stopped, run.state) == (8, False, "done")
    assert phases == ({"forward", "backward"} if high_water(torch.device("cpu")).available else set())
    assert all(f"{name} {format_bytes(nbytes)}" in repr(result) for name, nbytes in result.activations.items())
    assert run.losses[-1][1] < run.losses[0][1] / 2
    assert wb.tuner.adapters == ("default",)
    assert run is wb.training
    # The encoders were off the device meanwhile, and are back; what training adds has rows while it is there.
    places, rows, engine_phases = zip(*seen, strict=True)
    assert set(places) == {"disk"}
    assert set(engine_phases) == {"train"}
    assert {"adapters", "optimiser states", "training features"} <= rows[-1]
    after = {row.name for row in wb.memory.rows if row.nbytes}
    assert "adapters" in after
    assert not {"gradients", "optimiser states", "training features"} & after
    assert wb.modules["vision"].info.place == "device"
    assert wb.engine.phase == "idle"
    # Off again it answers as before: what was said is read anew.
    wb.tuner.switch(on=False)
    assert wb.chat("Hi", conversation="after").result().text == before


def test_gradients_have_a_row_while_they_are_there(wb: lab.Workbench, data: Dataset) -> None:
    held = []
    plain = Step.run

    def run_and_look(self: Step, dialogues: Any) -> torch.Tensor:
        loss = plain(self, dialogues)
        expected = sum(p.grad.nbytes for p in wb.model.parameters() if p.grad is not None)
        held.append(expected)
        return loss

    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "run", run_and_look)
        hook = register_optimizer_step_pre_hook(lambda *_: rows.append(wb.memory.nbytes("gradients")))
        try:
            wb.finetune(data, steps=2, **SMALL).result(WAIT)
        finally:
            hook.remove()
    assert rows == held
    assert min(held) == wb.memory.nbytes("adapters")  # in float32 as the weights that learn


def test_turns_wait_for_a_training_and_another_training_is_refused(wb: lab.Workbench, data: Dataset) -> None:
    turns = []

    def ask(run: TrainingRun) -> None:
        if run.step == 1 and not turns:
            turns.append(wb.chat("Hi", conversation="meanwhile", max_new_tokens=4))
            turns.append(wb.chat("Hi", conversation="cancelled", max_new_tokens=4))
            turns[1].cancel()
            with pytest.raises(TrainingError, match="the model is being trained already: wait for that run, or stop"):
                wb.finetune(data, steps=1)

    run = wb.finetune(data, steps=3, watch=ask, **SMALL)
    run.result(WAIT)
    assert run.step == 3
    assert turns[0].result(WAIT).text
    assert turns[1].result(WAIT).finish_reason == "cancelled"


def test_stopping_writes_a_checkpoint_and_resuming_ends_where_an_unbroken_run_does(
    wb: lab.Workbench, data: Dataset, tmp_path: Path
) -> None:
    whole = wb.finetune(data, steps=6, **SMALL)
    whole.result(WAIT)
    wanted = weights(wb)
    wb.tuner.remove()

    run = wb.finetune(
        data, steps=6, out=tmp_path / "run", watch=lambda run: run.stop() if run.step == 3 else None, **SMALL
    )
    result = run.result(WAIT)
    assert (result.steps, result.stopped, run.state) == (3, True, "stopped")
    assert result.checkpoint == tmp_path / "run" / "checkpoint-3"
    wb.tuner.remove()

    again = wb.finetune(data, steps=6, out=tmp_path / "run", resume=True, **SMALL)
    assert again.result(WAIT).steps == 6
    assert [step for step, _ in again.losses] == [4, 5, 6]
    found = weights(wb)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert dict(whole.losses[3:]) == pytest.approx(dict(again.losses), rel=1e-3)


def test_a_checkpoint_that_was_not_finished_is_no_checkpoint(
    wb: lab.Workbench, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill while it was written: the files are there, under another name."""
    from autoglm_lab.training import loop

    flush = loop.flush

    def dies_at_four(folder: Path) -> None:
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt
        flush(folder)

    monkeypatch.setattr(loop, "flush", dies_at_four)
    run = wb.finetune(data, steps=6, save_every=2, out=tmp_path / "run", **SMALL)
    with pytest.raises(KeyboardInterrupt):
        run.result(WAIT)
    assert run.state == "failed"
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert latest(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    assert wb.tuner.adapters == ()


def test_when_memory_runs_out_the_step_is_cut_smaller_and_learns_the_same(
    wb: lab.Workbench, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    wb.policy = wb.policy.replace(training={"checkpointing": "none"})
    plain = wb.finetune(data, steps=3, **SMALL)
    plain.result(WAIT)
    wb.tuner.remove()
    forward, failures = Step.loss, iter([True, False, False, True])

    def sometimes(self: Step, batch: Any, count: int) -> torch.Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return forward(self, batch, count)

    monkeypatch.setattr(Step, "loss", sometimes)
    run = wb.finetune(data, steps=3, **SMALL)
    result = run.result(WAIT)
    assert "6 of 6 layers computed again" in result.settings
    assert dict(run.losses) == pytest.approx(dict(plain.losses), rel=1e-4)
    told = [event.why for event in wb.events if event.kind == "out of memory"]
    assert "tried to allocate 2.00 GiB; now 3 of 6 layers computed again" in told[-2]


def test_what_never_fits_is_an_error_that_says_what_would_and_leaves_the_model_alone(
    wb: lab.Workbench, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Step, batch: Any, count: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    before = wb.chat("Hi", conversation="before").result().text
    monkeypatch.setattr(Step, "loss", never)
    run = wb.finetune(data, steps=3, **SMALL)
    with pytest.raises(OutOfMemoryError, match=r"out of memory in train.*training\.optimizer='adamw-8bit'"):
        run.result(WAIT)
    assert run.state == "failed"
    assert wb.tuner.adapters == ()
    assert wb.chat("Hi", conversation="after").result().text == before
    assert wb.modules["vision"].info.place == "device"


def test_full_training_changes_the_weights_and_parking_keeps_them(wb: lab.Workbench, data: Dataset) -> None:
    name = "model.vision_projector.linear_2.weight"
    before = wb.model.get_parameter(name).detach().clone()
    text = wb.model.lm_head.weight.detach().clone()
    run = wb.finetune(data, method="full", modules=["projector"], steps=2, learning_rate=1e-3)
    run.result(WAIT)
    learnt = wb.model.get_parameter(name).detach().clone()
    assert not torch.equal(learnt, before)
    assert torch.equal(wb.model.lm_head.weight, text)
    wb.modules["projector"].park()
    wb.modules["projector"].wake()
    assert torch.equal(wb.model.get_parameter(name), learnt)
    with torch.no_grad():
        wb.model.get_parameter(name).copy_(before)


def test_text_alone_is_learnt_with_the_encoders_off_and_images_are_not(wb: lab.Workbench, data: Dataset) -> None:
    text = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "brown"}]}
    wb.policy = wb.policy.replace(modules={"vision": "off", "audio": "off"})
    assert wb.finetune([text], steps=1, **SMALL).result(WAIT).steps == 1
    assert wb.modules["vision"].info.place == "disk"
    with pytest.raises(ModuleOffError, match=r"module 'vision' \(line 1 of the training data\)"):
        wb.finetune(data, steps=1, **SMALL).result(WAIT)


def test_encoders_come_back_after_what_training_left_is_given_back(wb: lab.Workbench, data: Dataset) -> None:
    wb.finetune(data, steps=1, **SMALL).result(WAIT)
    over = [event for event in wb.events if "training is over" in event.why]
    kinds = [event.kind for event in over[-3:]]
    assert sorted(kinds[1:]) == ["woke", "woke"]
    assert kinds[0] == "reclaimed"


def test_what_the_first_step_left_is_given_back_once_the_optimiser_has_its_states(
    wb: lab.Workbench, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    accelerator = wb.engine.state.accelerator
    give_back = accelerator.give_back

    def told() -> int:
        learnt = [value for name, value in wb.model.named_parameters() if ".lora_" in name]
        if wb.engine.phase == "train" and wb.training is not None and wb.training.state == "training":
            given.append(all(value.grad is None for value in learnt))
        return give_back()

    monkeypatch.setattr(accelerator, "give_back", told)
    run = wb.finetune(data, steps=3, **SMALL)
    run.result(WAIT)
    assert given == [True]


def test_bad_lines_and_too_long_dialogues_are_named_and_left_out(wb: lab.Workbench) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    long = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "Hello!"}]}
    run = wb.finetune([good, {}, long], steps=1, max_tokens=100, **SMALL)
    run.result(WAIT)
    assert [problem.split(":")[0] for problem in run.problems] == ["line 2", "line 3"]
    assert "tokens, the limit is 100" in run.problems[1]
    with pytest.raises(DatasetError, match="dialogues, line 2: it has no list 'messages'"):
        wb.finetune([good, {}], strict=True)


def test_settings_that_cannot_be_are_named(wb: lab.Workbench, data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is no setting 'ranks' of a training; there are method, name, rank"):
        wb.finetune(data, ranks=3)
    run = wb.finetune(data, resume=True, out=tmp_path, **SMALL)
    with pytest.raises(TrainingError, match="there is no whole checkpoint in"):
        run.result(WAIT)
    with pytest.raises(TrainingError, match=r"the model has no linear layer 'nothing': there are .*gate_up_proj"):
        wb.finetune(data, targets=["nothing"])


def test_a_run_shows_how_far_it_is(wb: lab.Workbench, data: Dataset) -> None:
    run = wb.finetune(data, steps=3, **SMALL)
    run.result(WAIT)
    assert repr(run).startswith("training 'default': done, step 3 of 3, loss ")
    page = run._repr_html_()
    assert "<svg" in page and "over 3 steps" in page
    assert curve([(1, 2.0)]) == ""
    json.dumps(run.losses)
