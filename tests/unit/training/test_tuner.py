from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autoglm_lab as lab
from autoglm_lab.errors import TrainingError
from autoglm_lab.training.dataset import Dataset
from autoglm_lab.training.step import Step

SMALL: dict[str, Any] = {"rank": 4, "alpha": 8.0, "warm_up": 1, "steps": 4}
pytestmark = pytest.mark.usefixtures("small_batches")


def stop_after_two(run: Any) -> None:
    if run.step == 2:
        run.stop()


def test_a_stopped_training_goes_on_with_the_same_data_and_settings(
    wb: lab.Workbench, data: Dataset, tmp_path: Path
) -> None:
    run = wb.finetune(data, out=tmp_path / "run", watch=stop_after_two, **SMALL)
    assert not wb.tuner.resumable, "it is under way"
    assert run.result(60).stopped
    assert wb.tuner.resumable
    again = wb.tuner.resume()
    assert (again.result(60).steps, [step for step, _ in again.losses]) == (4, [3, 4])
    assert wb.adapters == wb.tuner.adapters == ("default",)
    assert not wb.tuner.resumable, "it came to its end"
    with pytest.raises(TrainingError, match="there is no training to resume"):
        wb.tuner.resume()


def test_without_a_checkpoint_or_after_a_merge_there_is_nothing_to_resume(
    wb: lab.Workbench, data: Dataset, tmp_path: Path
) -> None:
    wb.finetune(data, watch=stop_after_two, **SMALL).result(60)
    assert not wb.tuner.resumable
    wb.tuner.remove()
    wb.finetune(data, out=tmp_path / "run", watch=stop_after_two, **SMALL).result(60)
    assert wb.tuner.resumable
    wb.tuner.merge()
    assert not wb.tuner.resumable, "what it learnt would be there twice"


def test_a_training_counts_the_tokens_that_its_steps_read(
    wb: lab.Workbench, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = Step.run

    def run_and_count(self: Step, dialogues: Any) -> Any:
        read.extend(map(len, dialogues))
        return plain(self, dialogues)

    monkeypatch.setattr(Step, "run", run_and_count)
    run = wb.finetune(data, **SMALL)
    run.result(60)
    assert len(read) == 8
    assert run.tokens == sum(read)
    assert run.tokens_per_second == run.tokens / run.seconds
