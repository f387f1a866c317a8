"""What a step allocates and frees, in order: recorded once, evaluated for any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

GRAIN = 512
"""What torch's allocator rounds every block up to."""


@dataclass(frozen=True, slots=True)
class Tape:
    """The blocks of one step.

    Attributes:
        order: what happens: ``i``, block i is allocated; ``~i``, it is freed.
        sizes: bytes of each block, before rounding.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most bytes in blocks at a time, each rounded up to `GRAIN`."""
        sizes = -(-np.asarray(self.sizes, np.int64) // GRAIN) * GRAIN
        changes = [sizes[at] if at >= 0 else -sizes[~at] for at in self.order]
        return int(np.cumsum([0, *changes]).max())

    @property
    def kept(self) -> int:
        """Bytes of the blocks that are not freed."""
        freed = {~at for at in self.order if at < 0}
        return sum(-(-size // GRAIN) * GRAIN for at, size in enumerate(self.sizes) if at not in freed)


class TapeFamily:
    """The tapes of one step at every length, from as many recorded ones as there are terms.

    The size of every block is a sum of the terms times factors of its own.

    Args:
        terms: of the lengths that a tape is asked for, such as ``lambda new, total: (1, new, total, new * total)``.
        points: lengths, and the tape recorded there.

    Raises:
        ValueError: the tapes differ in more than sizes: what is done depends on the length.
    """

    def __init__(self, terms: Callable[..., Sequence[int]], points: Sequence[tuple[tuple[int, ...], Tape]]) -> None:
        orders = {tape.order for _, tape in points}
        if len(orders) != 1:
            raise ValueError("the steps at these lengths are not the same")
        self._terms, self._order = terms, orders.pop()
        matrix = np.array([terms(*lengths) for lengths, _ in points], np.float64)
        sizes = np.array([tape.sizes for _, tape in points], np.float64)
        self._factors = np.linalg.solve(matrix, sizes)

    def at(self, *lengths: int) -> Tape:
        """The tape at other lengths."""
        sizes = np.asarray(self._terms(*lengths), np.float64) @ self._factors
        return Tape(self._order, tuple(np.rint(np.maximum(sizes, 0)).astype(np.int64).tolist()))
