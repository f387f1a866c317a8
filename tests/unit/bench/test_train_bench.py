from __future__ import annotations

import pytest
import torch

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.train import run


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft and the Trainer, of their own calls
def test_ours_and_the_trainer_are_timed_and_the_model_is_as_before() -> None:
    with Bench(small=True, say=lambda _: None) as bench:
        model = bench.workbench.model
        ids = torch.arange(20)[None]
        with torch.no_grad():
            before = model(input_ids=ids).logits
        names = [name for name, _ in model.named_parameters()]
        report = run(bench)
        with torch.no_grad():
            after = model(input_ids=ids).logits
        assert [name for name, _ in model.named_parameters()] == names
        assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(before, after)
    steps = [figure for figure in report.figures if figure.name.endswith("a step") and figure.unit == "s"]
    assert len(steps) == 4
    assert all(figure.ours for figure in steps)
    assert all(set(figure.peers) == {"Trainer", "Trainer, checkpointing"} for figure in steps[:3])
    assert steps[3].name == "adapters on NF4: a step"
    assert report.figures[-1].ours, "the plan's"
    assert all(figure.meets is None for figure in report.figures)  # a small run is not judged
