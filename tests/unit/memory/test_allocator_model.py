from __future__ import annotations

import pytest

from autoglm_lab.memory.planning.allocator_model import AllocatorModel
from autoglm_lab.memory.planning.tape import Tape, TapeFamily
from autoglm_lab.units import MiB


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [
        (1, 2 * MiB),
        (MiB, 2 * MiB),
        (MiB + 1, 20 * MiB),
        (10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB),
        (11 * MiB + 1, 12 * MiB),
    ],
)
def test_segments_have_the_sizes_of_the_documentation(nbytes, reserved):
    allocator = AllocatorModel()
    allocator.hold(nbytes)
    assert allocator.reserved == reserved


def test_a_freed_block_joins_its_neighbours_and_is_used_again():
    allocator = AllocatorModel()
    held = [allocator.hold(6 * MiB) for _ in range(3)]
    assert allocator.reserved == 20 * MiB
    for one in (held[0], held[2], held[1]):
        allocator.free(one)
    allocator.hold(9 * MiB)
    allocator.hold(9 * MiB)
    assert allocator.reserved == 20 * MiB
    assert allocator.allocated == 18 * MiB


def test_what_is_left_of_a_large_block_is_split_off_only_above_a_mebibyte():
    allocator = AllocatorModel()
    held = allocator.hold(30 * MiB)
    allocator.free(held)
    allocator.hold(29 * MiB)
    assert allocator.allocated == 30 * MiB


def test_a_tape_is_evaluated_between_its_points():
    points = [((new,), Tape((0, 1, ~0), (512 * new, new * new))) for new in (1, 2, 3)]
    family = TapeFamily(lambda new: (1, new, new * new), points)
    assert family.at(100) == Tape((0, 1, ~0), (51_200, 10_000))
    assert family.at(100).peak == 51_200 + 10_240


def test_tapes_of_other_steps_are_no_family():
    with pytest.raises(ValueError, match="are not the same"):
        TapeFamily(lambda new: (1, new), [((1,), Tape((0,), (1,))), ((2,), Tape((0, 1), (1, 1)))])
