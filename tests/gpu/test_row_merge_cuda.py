from __future__ import annotations

import torch

from autoglm_lab.models.row_merge import RowMerge


def test_rows_take_no_more_memory_than_the_result(device: torch.device) -> None:
    target = torch.randn(1, 2048, 4096, dtype=torch.bfloat16, device=device)
    mask = (torch.arange(2048, device=device) % 3 == 0)[None, :, None]
    source = torch.randn(700, 4096, dtype=torch.bfloat16, device=device)
    expected = target.masked_scatter(mask, source)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with RowMerge():
        found = target.masked_scatter(mask, source)
    assert torch.equal(found, expected)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.5 * target.nbytes + expected.nbytes
