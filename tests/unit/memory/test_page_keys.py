"""The key of a page covers what its keys and values depend on, and nothing else."""

from __future__ import annotations

import random

import pytest

from autoglm_lab.memory.kv.page_keys import page_keys


def test_a_page_inside_a_block_is_shared_only_with_the_rest_of_the_block() -> None:
    ids, blocks = list(range(1, 41)), [-1, *[0] * 35, *[-1] * 4]
    keys = page_keys(ids, blocks, (), 16)
    other = page_keys([*ids[:34], 99, *ids[35:]], blocks, (), 16)
    after = page_keys([*ids[:37], 99, *ids[38:]], blocks, (), 16)
    assert len(keys) == 2
    assert keys[0] != other[0]
    assert keys == after
    assert page_keys(ids, None, (), 16) == page_keys([*ids[:34], 99], None, (), 16)


def test_pages_of_other_media_are_not_shared() -> None:
    ids = [7] * 32
    one, same, other, shorter = (
        page_keys(ids, None, [(4, length, digest)], 16)
        for length, digest in [(20, "a"), (20, "a"), (20, "b"), (19, "a")]
    )
    assert one == same
    assert not set(one) & set(other)
    assert not set(one) & set(shorter)


@pytest.mark.parametrize("seed", range(3))
def test_going_on_from_known_keys_gives_the_same(seed: int) -> None:
    chance = random.Random(seed)
    ids = [chance.randrange(100) for _ in range(200)]
    blocks = [-1] * 30 + [0] * 50 + [-1] * 40 + [1] * 60 + [-1] * 20
    media = [(35, 20, "a"), (125, 33, "b")]
    whole = page_keys(ids, blocks, media, 16)
    # From where no block is cut: a page's key covers the rest of its block.
    for known in (1, 5, 6, 7, 12):
        assert page_keys(ids, blocks, media, 16, whole[:known]) == whole
    causal = page_keys(ids, None, media, 16)
    for known in range(13):
        assert page_keys(ids, None, media, 16, causal[:known]) == causal
