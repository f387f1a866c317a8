"""How a prompt is cut into steps, and what layers keep while they learn. Pure: the engine and the plan ask the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FEED_FORWARD_TOKENS = 512
"""Tokens that go through a feed-forward layer at once."""
BATCH_SIZES = (1, 2, 4, 8, 16)
"""Batches for which a decode step is captured; a batch in between takes the next larger one."""
LEAST_BYTES = 1 << 20
"""Activations below this cost more to move to the host than they free."""


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


@dataclass(frozen=True)
class Keeping:
    """What one layer keeps.

    Attributes:
        recompute: keep the input alone, and run the layer again in the backward pass.
        on_host: what is kept waits in host memory.
    """

    recompute: bool = False
    on_host: bool = False


def spread(count: int, share: float) -> frozenset[int]:
    """``share`` of ``count`` layers, evenly from the first on; so that copies have all of the pass to hide in."""
    wanted = round(count * share)
    return frozenset(number * count // wanted for number in range(wanted))


def keepings(count: int, recompute: frozenset[int], offload: float) -> tuple[Keeping, ...]:
    """What each of ``count`` layers keeps.

    Args:
        recompute: layers that keep their input alone.
        offload: share, 0 to 1, of what is kept that waits on the host: of the layers that are not recomputed where
            there are any, else of the inputs.
    """
    kept = [index for index in range(count) if index not in recompute] or list(range(count))
    on_host = {kept[number] for number in spread(len(kept), offload)}
    return tuple(Keeping(index in recompute, index in on_host) for index in range(count))


def recomputed(count: int, checkpointing: str, every: int) -> frozenset[int]:
    """Which of ``count`` layers ``none``, ``every-k`` or ``every-layer`` computes again in the backward pass."""
    if checkpointing == "every-layer":
        return frozenset(range(count))
    return frozenset(range(0, count, every)) if checkpointing == "every-k" else frozenset()
