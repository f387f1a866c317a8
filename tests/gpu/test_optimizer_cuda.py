"""The optimiser whose states take 8 bits, on a GPU: what it saves, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest

import autoglm_lab as lab
from autoglm_lab.training.finetune import Finetuning

pytest.importorskip("torchao")

DATA = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": f"<answer>{n}</answer>"},
        ]
    }
    for n in ("one", "two", "three", "four")
]
STEPS = 20


def learn(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], int, int]:
    """The losses, and the bytes of the optimiser's states: in the ledger at the last step, and as planned."""
    seen: list[int] = []
    stored = Finetuning._stored

    def watch(self: Finetuning, gradients: int, states: int) -> None:
        stored(self, gradients, states)
        seen.append(sum(row.nbytes or 0 for row in self.holdings() if row.name == "optimiser states"))

    monkeypatch.setattr(Finetuning, "_stored", watch)
    training: dict[str, Any] = {"micro_batch": 4, "accumulation": 1, "optimizer": optimizer}
    with lab.load("autoglm-tiny", device="cuda", dtype="float32", policy=lab.MemoryPolicy(training=training)) as wb:
        run = wb.finetune(DATA, rank=16, steps=STEPS, learning_rate=2e-3, warm_up=0)
        run.result(120)
        planned = lab.plan(wb, finetune="lora", tokens=32, rank=16)["train"].of("optimiser states")
        return [loss for _, loss in run.losses], seen[-1], planned


def test_states_in_8_bits_take_a_quarter_and_learn_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, nbytes, planned = learn("adamw", monkeypatch)
    short, fewer, planned_fewer = learn("adamw-8bit", monkeypatch)
    assert (nbytes, fewer) == (planned, planned_fewer)
    assert 0.25 < fewer / nbytes < 0.35
    assert short[0] == pytest.approx(losses[0], rel=1e-4)
    assert losses[-1] < losses[0] / 4
    assert short[-1] == pytest.approx(losses[-1], rel=0.25, abs=0.02)
