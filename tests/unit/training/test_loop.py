from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoglm_lab.training.loop import Learnt, Loop, arguments, optimizer_of, quietly


def test_weight_decay_shrinks_matrices_alone(tmp_path: Path) -> None:
    """Without a gradient AdamW does nothing else."""
    matrix, norm = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))

    def run(_examples: Sequence[Any]) -> Tensor:
        matrix.grad, norm.grad = torch.zeros(2, 3), torch.zeros(3)
        return torch.zeros(())

    told = arguments(
        tmp_path, torch.device("cpu"), batch=1, steps=4, rate=0.1, warm_up=0, schedule="constant", weight_decay=0.5,
        save_every=9, seed=0,
    )  # fmt: skip
    with quietly():
        learnt = Learnt({"up.weight": matrix, "norm.weight": norm})
        Loop(learnt, told, [1, 2, 3, 4], run, optimizer=optimizer_of("adamw", 0.1)).train()  # type: ignore[list-item]
    torch.testing.assert_close(matrix.detach(), torch.full((2, 3), (1 - 0.1 * 0.5) ** 4))
    assert norm.detach().tolist() == [1, 1, 1]
