"""What is shipped: the weighted mean of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recipes.tiny.ship import average


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("earlier.safetensors", "later.safetensors")]
    for path, value in zip(paths, (1.0, 3.0), strict=True):
        save_file({"weight": torch.full((4,), value, dtype=torch.bfloat16)}, path)
    return paths


def test_the_mean_follows_the_shares(checkpoints: list[Path]) -> None:
    mean = average(dict(zip(checkpoints, (0.25, 0.75), strict=True)))
    assert mean["weight"].tolist() == [2.5] * 4
    assert mean["weight"].dtype == torch.bfloat16


def test_shares_that_do_not_add_up_are_refused(checkpoints: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"the shares add up to 1\.25, not to 1"):
        average(dict(zip(checkpoints, (0.5, 0.75), strict=True)))
