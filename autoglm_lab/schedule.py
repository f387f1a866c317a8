"""How a prompt is cut into steps. Pure: the engine and whoever predicts it ask the same functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

FEED_FORWARD_TOKENS = 512
"""Tokens that go through a feed-forward layer at once."""
BATCH_SIZES = (1, 2, 4, 8, 16)
"""Batches for which a decode step is captured; a batch in between takes the next larger one."""


def prefill_chunks(
    start: int,
    end: int,
    most: int,
    blocks: Sequence[int] | None = None,
    whole: Iterable[tuple[int, int]] = (),
) -> list[tuple[int, int]]:
    """The steps in which tokens ``[start, end)`` are read, as ``(first, last + 1)``, about equally long.

    Args:
        most: tokens of a step. A step is longer only where a piece that must not be cut is.
        blocks: the bidirectional block of each token, -1 causal; None: all causal. A block is never cut: its tokens see
            one another.
        whole: other spans ``(first, last + 1)`` that must not be cut: media whose encoder output cannot be.
    """
    cuts: list[tuple[int, int]] = []
    spans = sorted([*_spans(blocks, end), *whole])
    at = start
    while at < end:
        left = end - at
        upto = at + -(-left // -(-left // most)) if left > most else end
        cuts.append((at, _allowed(at, upto, end, spans)))
        at = cuts[-1][1]
    return cuts


def _allowed(start: int, upto: int, end: int, spans: Iterable[tuple[int, int]]) -> int:
    """The place nearest before ``upto`` where no span is cut; behind the span where there is none after ``start``."""
    if upto == end:
        return end
    place = upto
    for first, last in sorted(spans, reverse=True):
        if first < place < last:
            place = first
    if place > start:
        return place
    place = upto
    for first, last in sorted(spans):
        if first < place < last:
            place = last
    return place


def _spans(blocks: Sequence[int] | None, end: int) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    first = 0
    for at in range(1, (end if blocks else 0) + 1):
        assert blocks is not None
        if at == end or blocks[at] != blocks[first]:
            if blocks[first] != -1 and at - first > 1:
                spans.append((first, at))
            first = at
    return spans
