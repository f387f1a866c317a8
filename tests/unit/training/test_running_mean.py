from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autoglm_lab as lab
from autoglm_lab.errors import TrainingError
from autoglm_lab.training.dataset import Dataset
from autoglm_lab.training.run import TrainingRun
from autoglm_lab.training.running_mean import RunningMean
from tests.unit.training.conftest import weights

COURSE: dict[str, Any] = {
    "rank": 4, "alpha": 8.0, "learning_rate": 5e-3, "warm_up": 1, "seed": 1, "schedule": "constant", "ema": 0.6,
}  # fmt: skip
WAIT = 60
pytestmark = pytest.mark.usefixtures("small_batches")


def test_it_is_the_exponential_moving_average_that_soon_forgets_where_it_began() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    mean = RunningMean({"w": weight}, 0.5)
    mean.apply()
    assert weight.tolist() == [0, 0]
    held = 0.0
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0), start=1):
        with torch.no_grad():
            weight.fill_(value)
        mean.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        held = value if step == 1 else decay * held + (1 - decay) * value
    assert (1 + 7) / (10 + 7) < 0.5 < (1 + 9) / (10 + 9)
    mean.apply()
    assert weight.tolist() == [pytest.approx(held, rel=2**-8)] * 2


def test_what_is_learnt_is_the_mean_and_resuming_ends_with_the_same(
    wb: lab.Workbench, data: Dataset, tmp_path: Path
) -> None:
    made: list[dict[str, torch.Tensor]] = []

    def look(run: TrainingRun) -> None:
        if run.state == "training" and run.step == len(made) + 1:
            made.append(weights(wb))

    wb.finetune(data, steps=6, watch=look, **COURSE).result(WAIT)
    wanted = weights(wb)
    assert len(made) == 6
    for name, value in wanted.items():
        held = made[0][name]
        for step in range(2, 7):
            decay = min(0.6, (1 + step) / (10 + step))
            held = decay * held + (1 - decay) * made[step - 1][name]
        torch.testing.assert_close(value, held, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(value, made[-1][name], rtol=1e-3) for name, value in wanted.items())
    wb.tuner.remove()

    out = tmp_path / "run"
    run = wb.finetune(data, steps=6, out=out, watch=lambda run: run.stop() if run.step == 3 else None, **COURSE)
    assert run.result(WAIT).stopped
    halfway = weights(wb)
    assert any(not torch.allclose(value, made[2][name], rtol=1e-3) for name, value in halfway.items())
    wb.tuner.remove()
    wb.finetune(data, steps=6, out=out, resume=True, **COURSE).result(WAIT)
    for name, value in weights(wb).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_without_one_is_another_training(wb: lab.Workbench, data: Dataset, tmp_path: Path) -> None:
    without = COURSE | {"ema": None}
    wb.finetune(data, steps=1, save_every=1, out=tmp_path, **without).result(WAIT)
    wb.tuner.remove()
    run = wb.finetune(data, steps=2, out=tmp_path, resume=True, **COURSE)
    with pytest.raises(TrainingError, match="checkpoint of a training without such a mean: resume with the same ema"):
        run.result(WAIT)


def test_a_constant_rate_stays_after_the_warm_up(wb: lab.Workbench, data: Dataset) -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda one, _args, _named: rates.append(one.param_groups[0]["lr"]))
    try:
        wb.finetune(data, steps=4, **COURSE).result(WAIT)
    finally:
        hook.remove()
    assert rates == pytest.approx([0, 5e-3, 5e-3, 5e-3])
