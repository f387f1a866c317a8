"""How a prompt is cut into steps."""

from __future__ import annotations

import itertools

import pytest

from autoglm_lab.schedule import prefill_chunks


def test_chunks_are_about_equal_and_cover_everything() -> None:
    chunks = prefill_chunks(0, 8192, 1536)
    assert chunks[0][0] == 0
    assert chunks[-1][1] == 8192
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(chunks))
    lengths = {end - start for start, end in chunks}
    assert len(chunks) == 6
    assert max(lengths) - min(lengths) <= 1


def test_what_fits_one_step_is_one_step() -> None:
    assert prefill_chunks(100, 164, 1536) == [(100, 164)]
    assert prefill_chunks(5, 5, 16) == []


def test_a_bidirectional_block_is_never_cut() -> None:
    blocks = [-1] * 10 + [0] * 30 + [-1] * 10
    chunks = prefill_chunks(0, 50, 16, blocks)
    assert (10, 40) in chunks
    assert [start for start, _ in chunks][1:] == [end for _, end in chunks][:-1]


def test_neighbouring_blocks_may_be_parted() -> None:
    blocks = [0] * 12 + [1] * 12
    assert prefill_chunks(0, 24, 12, blocks) == [(0, 12), (12, 24)]


@pytest.mark.parametrize("most", [1, 7, 16, 33])
def test_other_spans_stay_whole_too(most: int) -> None:
    for start, end in prefill_chunks(0, 64, most, None, [(20, 31), (40, 60)]):
        assert not 20 < start < 31
        assert not 40 < end < 60
