"""The Triton kernels against the plain way to write, read and attend to pages.

Without a GPU they run in Triton's interpreter, where Triton is installed and ``TRITON_INTERPRET=1`` asks for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from autoglm_lab.memory.kv import paged_kernels
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat, PageStore, Precision

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and Triton's interpreter was not asked for", allow_module_level=True)

LENGTHS = [5, 200, 64]


@dataclass(frozen=True)
class Pages:
    form: PageFormat
    store: PageStore


def pages_for(precision: Precision, dim: int = 32) -> Pages:
    form = PageFormat(2, 2, dim, torch.float32, precision)
    stride = -(-form.nbytes // 512) * 512
    return Pages(form, PageStore(form, torch.zeros(64 * stride, dtype=torch.uint8, device=DEVICE), stride))


def scattered(lengths: list[int]) -> torch.Tensor:
    """A block table whose pages lie anywhere: ``int32 [batch, 20]``."""
    order = (torch.randperm(60, generator=torch.Generator().manual_seed(0)) + 1).int()
    table = torch.zeros(len(lengths), 20, dtype=torch.int32)
    at = 0
    for row, length in enumerate(lengths):
        count = -(-length // PAGE_TOKENS)
        table[row, :count] = order[at : at + count]
        at += count
    return table.to(DEVICE)


def made_up(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def fill(pages: Pages, table: torch.Tensor, lengths: list[int]) -> None:
    for row, length in enumerate(lengths):
        places = torch.arange(length, device=DEVICE)
        keys, values = (made_up(1, length, 2, pages.form.head_dim, seed=10 * row + part) for part in (0, 1))
        where = table[row][places // PAGE_TOKENS].long()[None], (places % PAGE_TOKENS)[None]
        pages.store.write(1, *where, keys, values)


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
@pytest.mark.parametrize("new", [1, 37])
def test_what_is_written_is_the_same_to_the_bit(precision: Precision, new: int) -> None:
    lengths, table = [40, 100, 64], scattered([40, 100, 64])
    ours, plain = pages_for(precision), pages_for(precision)
    keys, values = made_up(3, 2, new, 32), made_up(3, 2, new, 32, seed=2)
    ends = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    paged_kernels.write(ours, 0, keys, values, table, ends)
    places = ends.long()[:, None] - new + torch.arange(new, device=DEVICE)
    where = table.long().gather(1, places // PAGE_TOKENS), places % PAGE_TOKENS
    plain.store.write(0, *where, keys.transpose(1, 2), values.transpose(1, 2))
    assert torch.equal(ours.store.layer_bytes(0), plain.store.layer_bytes(0))


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
def test_what_is_read_is_the_same(precision: Precision) -> None:
    pages, table = pages_for(precision), scattered(LENGTHS)
    fill(pages, table, LENGTHS)
    for ours, plain in zip(paged_kernels.read(pages, 1, table, 77), pages.store.read(1, table.long()), strict=True):
        torch.testing.assert_close(ours, plain[:, :, :77], atol=1e-6, rtol=0)


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
@pytest.mark.parametrize("heads", [2, 8, 34])
def test_attention_over_pages_equals_attention_over_what_was_gathered(precision: Precision, heads: int) -> None:
    pages, table = pages_for(precision), scattered(LENGTHS)
    fill(pages, table, LENGTHS)
    query = made_up(3, heads, 1, 32)
    ends = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    attended = paged_kernels.attend(pages, 1, query, 32**-0.5, table, ends)
    keys, values = pages.store.read(1, table.long())
    for row, length in enumerate(LENGTHS):
        given = (one[row : row + 1, :, :length] for one in (keys, values))
        expected = functional.scaled_dot_product_attention(query[row : row + 1], *given, enable_gqa=True)
        torch.testing.assert_close(attended[row : row + 1], expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
def test_a_layer_that_was_brought_to_the_gpu_gives_the_same(precision: Precision) -> None:
    pages, table = pages_for(precision), scattered(LENGTHS)
    fill(pages, table, LENGTHS)
    form = PageFormat(1, 2, 32, torch.float32, precision)
    stride = -(-form.nbytes // 512) * 512
    stage = Pages(form, PageStore(form, torch.zeros(3 * 16 * stride, dtype=torch.uint8, device=DEVICE), stride))
    own = torch.arange(48, dtype=torch.int32, device=DEVICE).view(3, 16)
    ends = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    paged_kernels.copy(pages, 1, stage, table, ends, 16)
    query = made_up(3, 8, 1, 32)
    attended = (
        paged_kernels.attend(*of, query, 1.0, which, ends) for *of, which in ((pages, 1, table), (stage, 0, own))
    )
    assert torch.equal(*attended)
