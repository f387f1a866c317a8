"""How torch's caching allocator takes memory from a device, as far as a plan needs it.

The rules are those of its documentation and sources (c10/cuda/CUDACachingAllocator): blocks of up to 1 MiB come from
segments of 2 MiB, larger ones below 10 MiB from segments of 20 MiB, the rest from segments rounded up to 2 MiB; the
smallest free block that is large enough is taken, and what is left of it is split off.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from autoglm_lab.memory.planning.tape import GRAIN, Tape
from autoglm_lab.units import MiB

_SMALL = MiB
_SMALL_SEGMENT, _MIDDLE_SEGMENT = 2 * MiB, 20 * MiB
_MIDDLE = 10 * MiB


@dataclass(eq=False)
class _Block:
    segment: int
    start: int
    size: int
    small: bool
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        return self.size, self.segment, self.start


Held = dict[int, _Block]


@dataclass
class AllocatorModel:
    """The allocator's segments after what was played to it.

    Attributes:
        reserved: bytes of all segments.
        allocated: bytes in blocks that are in use.
    """

    reserved: int = 0
    allocated: int = 0
    peak_allocated: int = 0
    _segments: int = 0
    _keys: dict[bool, list[tuple[int, int, int]]] = field(default_factory=lambda: {True: [], False: []})
    _blocks: dict[tuple[int, int], _Block] = field(default_factory=dict)

    def play(self, tape: Tape) -> Held:
        """Allocate and free as ``tape`` says. Returns what it does not free."""
        held: Held = {}
        for at in tape.order:
            if at < 0:
                block = held.pop(~at, None)
                if block is not None:
                    self._give(block)
            elif tape.sizes[at]:
                held[at] = self._take(tape.sizes[at])
        return held

    def hold(self, nbytes: int) -> Held:
        """Allocate one block."""
        return {0: self._take(nbytes)}

    def free(self, held: Held) -> None:
        """Free what `play` or `hold` returned."""
        for block in held.values():
            self._give(block)
        held.clear()

    def _take(self, nbytes: int) -> _Block:
        size = max(GRAIN, -(-nbytes // GRAIN) * GRAIN)
        small = size <= _SMALL
        keys = self._keys[small]
        at = bisect_left(keys, (size, -1, -1))
        if at < len(keys):
            _, segment, start = keys.pop(at)
            block = self._blocks[segment, start]
        else:
            length = _segment_size(size)
            block = _Block(self._segments, 0, length, small)
            self._blocks[self._segments, 0] = block
            self._segments += 1
            self.reserved += length
        left = block.size - size
        if left >= GRAIN if small else left > _SMALL:
            rest = _Block(block.segment, block.start + size, left, small, True, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.size, block.after = size, rest
            self._blocks[rest.segment, rest.start] = rest
            insort(keys, rest.key)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def _give(self, block: _Block) -> None:
        self.allocated -= block.size
        keys = self._keys[block.small]
        if block.after is not None and block.after.free:
            self._join(block, block.after, keys)
        if block.before is not None and block.before.free:
            before = block.before
            keys.pop(bisect_left(keys, before.key))
            self._absorb(before, block)
            block = before
        block.free = True
        insort(keys, block.key)

    def _join(self, block: _Block, after: _Block, keys: list[tuple[int, int, int]]) -> None:
        keys.pop(bisect_left(keys, after.key))
        self._absorb(block, after)

    def _absorb(self, block: _Block, after: _Block) -> None:
        block.size, block.after = block.size + after.size, after.after
        if after.after is not None:
            after.after.before = block
        del self._blocks[after.segment, after.start]


def _segment_size(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _MIDDLE:
        return _MIDDLE_SEGMENT
    return -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
