"""Where icons stand on a 224x224 screen: training layouts and held-out ones.

A layout gives slots `(x, y)` in pixels for icons up to a radius. Held-out layouts (brick rows, ring, diagonal, and the
grids 4x4 and 3x5) never occur in training, where other grids and free placement cover the same positions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Final

from recipes.tiny.phrases import Split

SIZE: Final = 224
Slots = list[tuple[float, float]]
TRAIN_RADII: Final = (10, 11, 13, 14, 16, 17, 19, 20, 22)
HELD_RADII: Final = (12, 15, 18, 21)
TRAIN_GRIDS: Final = ((2, 3), (2, 4), (3, 3), (3, 4), (4, 3), (4, 5), (5, 4), (5, 5), (2, 5), (3, 2), (4, 2))
HELD_GRIDS: Final = ((4, 4), (3, 5), (5, 3))


def _grid(rng: random.Random, radius: int, top: int, shape: tuple[int, int]) -> Slots:
    columns, rows = shape
    cell_w, cell_h = SIZE / columns, (SIZE - top) / rows
    slack_x, slack_y = max(0.0, cell_w / 2 - radius - 2), max(0.0, cell_h / 2 - radius - 2)
    shift_x, shift_y = rng.uniform(-slack_x, slack_x) * 0.8, rng.uniform(-slack_y, slack_y) * 0.8
    jitter = rng.choice((0.0, 0.0, 1.0, 3.0))
    slots = []
    for row in range(rows):
        for column in range(columns):
            x = (column + 0.5) * cell_w + shift_x + rng.uniform(-jitter, jitter)
            y = top + (row + 0.5) * cell_h + shift_y + rng.uniform(-jitter, jitter)
            slots.append((x, y))
    return slots


def train_grid(rng: random.Random, radius: int, top: int) -> Slots:
    return _grid(rng, radius, top, rng.choice(TRAIN_GRIDS))


def held_grid(rng: random.Random, radius: int, top: int) -> Slots:
    return _grid(rng, radius, top, rng.choice(HELD_GRIDS))


def free(rng: random.Random, radius: int, top: int) -> Slots:
    slots: Slots = []
    gap = 2 * radius + rng.choice((3, 6, 12))
    for _ in range(80):
        x, y = rng.uniform(radius + 2, SIZE - radius - 2), rng.uniform(top + radius + 2, SIZE - radius - 2)
        if all(math.hypot(x - a, y - b) >= gap for a, b in slots):
            slots.append((x, y))
            if len(slots) == 12:
                break
    return slots


def rows_list(rng: random.Random, radius: int, top: int) -> Slots:
    count = max(2, min(6, (SIZE - top) // (2 * radius + 6)))
    x = rng.uniform(radius + 4, SIZE - radius - 4)
    step = (SIZE - top) / count
    return [(x, top + (i + 0.5) * step) for i in range(count)]


def dock(rng: random.Random, radius: int, top: int) -> Slots:
    columns = rng.choice((3, 4, 5))
    bottom = [((i + 0.5) * SIZE / columns, SIZE - radius - 6.0) for i in range(columns)]
    upper = rng.choice((2, 3))
    height = (SIZE - top - 2 * radius - 16) / upper
    rows = [((i + 0.5) * SIZE / columns, top + (j + 0.5) * height) for j in range(upper) for i in range(columns)]
    return bottom + rows if height >= 2 * radius + 2 else bottom


def brick(rng: random.Random, radius: int, top: int) -> Slots:
    step_x, step_y = 2 * radius + rng.uniform(14, 30), 2 * radius + rng.uniform(8, 20)
    slots, y, odd = [], top + radius + 4.0, False
    while y <= SIZE - radius - 2:
        x = radius + 4.0 + (step_x / 2 if odd else 0.0)
        while x <= SIZE - radius - 2:
            slots.append((x, y))
            x += step_x
        y += step_y
        odd = not odd
    return slots


def ring(rng: random.Random, radius: int, top: int) -> Slots:
    centre_y, turn = (SIZE + top) / 2, rng.uniform(0, math.tau)
    reach = (SIZE - top) / 2 - radius - 4
    count = max(4, min(9, int(math.tau * reach / (2 * radius + 6))))
    angles = [turn + i * math.tau / count for i in range(count)]
    return [(SIZE / 2 + reach * math.cos(a), centre_y + reach * math.sin(a)) for a in angles]


def diagonal(rng: random.Random, radius: int, top: int) -> Slots:
    count = max(3, min(6, int((SIZE - top) / (2 * radius + 8))))
    rising = rng.random() < 0.5
    slots = []
    for i in range(count):
        y = top + radius + 4 + i * (SIZE - top - 2 * radius - 8) / (count - 1)
        x = radius + 4 + i * (SIZE - 2 * radius - 8) / (count - 1)
        slots.append((SIZE - x if rising else x, y))
    return slots


LAYOUTS: Final[dict[Split, tuple[Callable[[random.Random, int, int], Slots], ...]]] = {
    "train": (train_grid, train_grid, free, free, free, rows_list, dock),
    "held": (held_grid, brick, ring, diagonal),
}
RADII: Final[dict[Split, tuple[int, ...]]] = {"train": TRAIN_RADII, "held": HELD_RADII}


def place(rng: random.Random, split: Split, top: int) -> tuple[int, Slots]:
    """Radius in pixels and shuffled slots that do not overlap and lie on the screen below `top`."""
    radius = rng.choice(RADII[split])
    slots = rng.choice(LAYOUTS[split])(rng, radius, top)
    kept: Slots = []
    for x, y in slots:
        inside = radius <= x <= SIZE - radius and top + radius <= y <= SIZE - radius
        if inside and all(math.hypot(x - a, y - b) >= 2 * radius + 1 for a, b in kept):
            kept.append((x, y))
    rng.shuffle(kept)
    return (radius, kept) if len(kept) >= 2 else place(rng, split, top)
