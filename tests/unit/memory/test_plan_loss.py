"""How the loss is cut changes the plan of a training without the whole step being traced again."""

from __future__ import annotations

from typing import Literal

import pytest

from autoglm_lab.memory.planning import plan_train
from autoglm_lab.memory.planning.plan_train import TrainingCosts
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.models.loading import outline
from autoglm_lab.policy import TrainingPolicy
from autoglm_lab.schedule import Keeping
from autoglm_lab.units import MiB

LOAD = TrainingLoad("lora", 700, 4)
SEGMENT = 22 * MiB
"""A segment of torch's allocator, and a small one: which blocks share one depends on all that came before."""


@pytest.mark.parametrize(("kind", "chunk"), [("cpu", 64), ("cuda", 1024)])
def test_another_slice_of_the_loss_is_planned_as_a_trace_of_all_has_it(
    kind: Literal["cpu", "cuda"], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = TrainingCosts(outline("autoglm-tiny", device=kind), kind)
    whole = costs._traced(LOAD, 1, chunk)
    default = costs.step(LOAD, TrainingPolicy(micro_batch=1))
    monkeypatch.delattr(plan_train, "trace")
    step = costs.step(LOAD, TrainingPolicy(micro_batch=1, loss_chunk=chunk))
    assert step.loss == whole.loss != default.loss
    for name in ("layer", "movable", "rest", "backward", "tail"):
        assert getattr(step, name) == getattr(whole, name)
    for kept in (Keeping(), Keeping(recompute=True)):
        layers = [kept] * costs.layers
        assert abs(step.reserved(layers, moves=False) - whole.reserved(layers, moves=False)) <= 2 * SEGMENT
    longer = costs.step(LOAD, TrainingPolicy(micro_batch=1, loss_chunk=4096))
    assert longer == costs.step(LOAD, TrainingPolicy(micro_batch=1, loss_chunk=1024)), "there are no more tokens"
