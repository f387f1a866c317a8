"""The tape of a model with all of its layers, from one with a few: every layer of a kind does the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from autoglm_lab.memory.planning.tape import Tape

Place = tuple[int, int | None, int]
"""A block: the pass in which it is allocated, the layer (None: between passes), and which of their blocks it is."""


def least_layers(layers: int, period: int) -> int:
    """How many layers stand for ``layers`` whose kinds come again every ``period``: the same ones at the end."""
    few = period + layers % period
    return min(layers, few if few > period else few + period)


@dataclass(frozen=True)
class LayeredTape:
    """One or more passes through a model with few layers.

    Attributes:
        tape: all of them.
        starts: where in its order each layer begins, and where the last one ends, by pass.
    """

    tape: Tape
    starts: tuple[tuple[int, ...], ...]

    def deepened(self, layers: int, period: int) -> Tape:
        """The same passes through a model with ``layers`` layers.

        Args:
            layers: of which `least_layers` are those of this tape.
            period: layers after which their kinds come again.

        Raises:
            ValueError: what a layer does depends on more than its kind.
        """
        few = len(self.starts[0]) - 1
        if layers == few:
            return self.tape
        copies, rest = divmod(layers - few, period)
        if rest or copies < 0 or few <= period:
            raise ValueError("these layers do not end as those do")
        steps, places = self._steps(), self._places()
        order: list[int] = []
        sizes: list[int] = []
        made: dict[Place, int] = {}
        for at, layer, copy in self._sequence(few, period, copies):
            count = 0
            for event in steps[at, layer]:
                if event >= 0:
                    made[at, None if layer is None else layer + copy * period, count] = len(sizes)
                    count += 1
                    order.append(len(sizes))
                    sizes.append(self.tape.sizes[event])
                    continue
                when, whose, which = places[~event]
                if layer is not None and whose is not None:
                    whose += copy * period
                elif whose is not None:  # between passes the last layer's blocks go, and no other's
                    whose += copies * period
                block = made.pop((when, whose, which), None)
                if block is None:
                    raise ValueError("a block is freed that a layer of this kind did not allocate")
                order.append(~block)
        return Tape(tuple(order), tuple(sizes))

    def _sequence(self, few: int, period: int, copies: int) -> Iterator[tuple[int, int | None, int]]:
        """The pass, the layer of this tape, and how often those that are repeated have come before, as they come."""
        yield 0, None, 0
        for at in range(len(self.starts)):
            yield at, 0, 0
            for copy in range(copies + 1):
                for layer in range(1, period + 1):
                    yield at, layer, copy
            for layer in range(period + 1, few):
                yield at, layer, copies
            yield at + 1, None, 0

    def _spans(self) -> Iterator[tuple[int, int | None, int, int]]:
        before = 0
        for at, starts in enumerate(self.starts):
            yield at, None, before, starts[0]
            for layer, (start, end) in enumerate(pairwise(starts)):
                yield at, layer, start, end
            before = starts[-1]
        yield len(self.starts), None, before, len(self.tape.order)

    def _steps(self) -> dict[tuple[int, int | None], tuple[int, ...]]:
        return {(at, layer): self.tape.order[start:end] for at, layer, start, end in self._spans()}

    def _places(self) -> dict[int, Place]:
        return {
            block: (at, layer, which)
            for at, layer, start, end in self._spans()
            for which, block in enumerate(one for one in self.tape.order[start:end] if one >= 0)
        }
