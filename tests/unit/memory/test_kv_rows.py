"""What the ledger says of pages while conversations take, share, cut and drop them at random."""

from __future__ import annotations

import random

import torch

from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat
from autoglm_lab.memory.kv.paged_sequence import PagedSequence


def test_rows_of_pages_equal_a_count_of_every_page() -> None:
    pool = KvPool(PageFormat(layers=1, kv_heads=2, head_dim=16, dtype=torch.float32), open_accelerator("cpu"))
    chance = random.Random(0)
    sequences = [PagedSequence(pool) for _ in range(6)]
    for _ in range(400):
        one, other = chance.sample(sequences, 2)
        match chance.randrange(4):
            case 0:
                one.reserve(chance.randrange(1, 100))
                one.tokens = len(one.pages) * PAGE_TOKENS
            case 1:
                begin = other.pages[: chance.randrange(len(other.pages) + 1)]
                pool.share(begin)
                one.adopt(begin)
            case 2:
                one.keep(chance.randrange(one.tokens + 1))
            case _:
                one.keep(0)
        for sequence in sequences:
            alone = sum(pool.holders(page) == 1 for page in sequence.pages)
            assert sequence.own_nbytes == alone * pool.page_bytes
        held = [page for sequence in sequences for page in sequence.pages]
        several = sum(held.count(page) > 1 for page in set(held))
        rows = {row.name: row.nbytes for row in pool.holdings()}
        assert rows.get("KV shared prefixes", 0) == several * pool.page_bytes
    pool.close()
