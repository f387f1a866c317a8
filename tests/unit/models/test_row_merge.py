from __future__ import annotations

import pytest
import torch
from PIL import Image

import autoglm_lab as lab
from autoglm_lab.models import row_merge
from autoglm_lab.models.row_merge import RowMerge


@pytest.mark.parametrize("rows", [[], [0], [1, 2, 5], range(7)])
@pytest.mark.parametrize("more", [0, 3])
def test_it_gives_what_masked_scatter_gives(rows: list[int], more: int) -> None:
    target = torch.randn(1, 7, 4)
    mask = torch.zeros(1, 7, 1, dtype=torch.bool)
    mask[:, list(rows)] = True
    source = torch.randn(len(rows) + more, 4)
    expected = target.masked_scatter(mask, source)
    with RowMerge():
        found = target.masked_scatter(mask, source)
    assert torch.equal(found, expected)
    assert found.data_ptr() != target.data_ptr()


def test_another_mask_is_left_to_torch() -> None:
    target, source = torch.randn(1, 3, 4), torch.randn(12)
    mask = torch.rand(1, 3, 4) > 0.5
    with RowMerge():
        assert torch.equal(
            target.masked_scatter(mask, source), torch.where(mask, 0.0, target).masked_scatter(mask, source)
        )


def test_too_few_rows_are_torchs_error() -> None:
    with RowMerge(), pytest.raises(RuntimeError):
        torch.zeros(1, 3, 4).masked_scatter(torch.ones(1, 3, 1, dtype=torch.bool), torch.zeros(2, 4))


def test_prompts_with_media_are_merged_so(wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[bool] = []
    plain = row_merge._merged

    def told(*given: torch.Tensor) -> torch.Tensor | None:
        merged.append((result := plain(*given)) is not None)
        return result

    monkeypatch.setattr(row_merge, "_merged", told)
    wb.chat("Where is it?", image=Image.new("RGB", (64, 64), "red"), max_new_tokens=2).result(60)
    assert merged and all(merged)
