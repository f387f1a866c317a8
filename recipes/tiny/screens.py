"""Screens: a procedural phone screen with everything one can ask about it.

`draw_screen(rng, split, kind)` gives a `Screen`: the 224x224 picture and its objects with their pixel boxes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from recipes.tiny import drawing
from recipes.tiny.layouts import SIZE, place
from recipes.tiny.phrases import COLOURS, SHAPES, Split

Kind = Literal["icons", "keypad"]
KEYS: Final = "123456789*0#"
KEYPADS: Final[dict[Split, tuple[str, ...]]] = {
    "train": ("round light", "square light", "round dark", "flat", "outlined", "tall"),
    "held": ("pill", "tinted", "inverse"),
}
GLYPH_SIZES: Final[dict[Split, tuple[int, ...]]] = {"train": (15, 16, 18, 19, 21, 22, 24, 26), "held": (17, 20, 23)}


@dataclass(frozen=True)
class Thing:
    """Something on the screen. `kind` is icon, key or search; the box is (x0, y0, x1, y1) in pixels."""

    kind: Literal["icon", "key", "search"]
    colour: str
    shape: str
    x: int
    y: int
    box: tuple[int, int, int, int]
    radius: int = 0

    def contains(self, x: float, y: float) -> bool:
        """Whether pixel (x, y) lies on it; an icon asks its silhouette, one pixel of slack, others their box."""
        x0, y0, x1, y1 = self.box
        if not (x0 <= x <= x1 and y0 <= y <= y1):
            return False
        if self.kind != "icon":
            return True
        silhouette = np.asarray(drawing.mask(self.shape, self.radius)) > 64
        column, row = round(x) - self.x + self.radius, round(y) - self.y + self.radius
        near = silhouette[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        return bool(near.any())


@dataclass(frozen=True)
class Screen:
    """A picture and what is on it. `pixels` is [224, 224, 3] uint8."""

    pixels: npt.NDArray[np.uint8]
    things: tuple[Thing, ...]
    kind: Kind

    @property
    def icons(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.kind == "icon")

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


def thousandths(thing: Thing) -> tuple[int, int]:
    """The centre in the action format's coordinates, 0 to 999."""
    return round(thing.x / (SIZE - 1) * 999), round(thing.y / (SIZE - 1) * 999)


def pixel(x: int, y: int) -> tuple[float, float]:
    """Back from 0 to 999 to pixels."""
    return x / 999 * (SIZE - 1), y / 999 * (SIZE - 1)


def _bars(rng: random.Random, draw: ImageDraw.ImageDraw, x: float, y: float, dark: bool) -> None:
    tone = rng.randint(140, 190) if not dark else rng.randint(90, 140)
    width = rng.randint(10, 22)
    draw.rectangle((x - width // 2, y, x + width // 2, y + 2), fill=(tone, tone, tone))


def _search(rng: random.Random, canvas: Image.Image, top: int, dark: bool) -> Thing:
    draw = ImageDraw.Draw(canvas)
    margin, height = rng.randint(6, 40), rng.randint(17, 25)
    y0 = top + rng.randint(2, 8)
    box = (margin, y0, SIZE - 1 - margin, y0 + height)
    fill = (52, 54, 60) if dark else (255, 255, 255)
    line = (150, 150, 156)
    draw.rounded_rectangle(
        box, radius=rng.choice((3, 8, height // 2)), fill=fill, outline=line if rng.random() < 0.8 else None
    )
    middle, lens = y0 + height // 2, 4
    left = rng.random() < 0.7
    x = box[0] + 12 if left else box[2] - 12
    draw.ellipse((x - lens, middle - lens, x + lens - 1, middle + lens - 1), outline=line, width=2)
    draw.line((x + 3, middle + 3, x + 6, middle + 6), fill=line, width=2)
    if rng.random() < 0.7:
        words = drawing.glyph(rng.choice(("Search", "Search apps", "Find", "Search...")), rng.choice((10, 11, 12)))
        canvas.paste(line, (box[0] + (22 if left else 10), middle - words.height // 2), words)
    return Thing("search", "", "search", (box[0] + box[2]) // 2, middle, box)


def _icons(rng: random.Random, split: Split, canvas: Image.Image, dark: bool, top: int, most: int) -> list[Thing]:
    radius, slots = place(rng, split, top)
    style = rng.choice(drawing.STYLES[split])
    count = min(len(slots), rng.randint(1, most))
    # A small palette on some screens makes counts above one and near misses frequent.
    colours = rng.sample(list(COLOURS), rng.choice((2, 3, 8, 8)))
    shapes = rng.sample(list(SHAPES), rng.choice((2, 3, 6, 6)))
    labels = rng.random() < 0.3
    # Light, grey, or nearly black tiles; the dark tile between them is a held-out style.
    grey = rng.choice((rng.randint(205, 255), rng.randint(205, 255), rng.randint(165, 205), rng.randint(8, 40)))
    tile = (grey, grey, min(255, grey + rng.randint(0, 8)))
    draw = ImageDraw.Draw(canvas)
    things = []
    for x, y in slots[:count]:
        colour, shape, left, top_px = rng.choice(colours), rng.choice(shapes), round(x), round(y)
        drawing.icon(canvas, style, shape, drawing.shade(rng, colour, split), left, top_px, radius, dark, tile)
        if labels and y + radius + 5 < SIZE:
            _bars(rng, draw, x, y + radius + 2, dark)
        box = (left - radius, top_px - radius, left + radius, top_px + radius)
        things.append(Thing("icon", colour, shape, left, top_px, box, radius))
    return things


def key_order(rng: random.Random) -> str:
    """Twelve keys row by row: a phone's order mostly, a calculator's or a shuffled one at times."""
    roll = rng.random()
    if roll < 0.6:
        return KEYS
    if roll < 0.75:
        return "789456123*0#"
    digits = rng.sample("0123456789", 10)
    return "".join(digits[:9]) + "*" + digits[9] + "#"


def _keypad(rng: random.Random, split: Split, canvas: Image.Image, dark: bool) -> list[Thing]:
    look = rng.choice(KEYPADS[split])
    draw = ImageDraw.Draw(canvas)
    top = rng.randint(4, 70)
    width, height = rng.randint(120, 216), min(rng.randint(132, 214), SIZE - 4 - top)
    left = rng.randint(4, SIZE - 4 - width)
    cell_w, cell_h = width / 3, height / 4
    size = min(rng.choice(GLYPH_SIZES[split]), int(cell_h * 0.62))
    segments = rng.random() < 0.2
    gap = rng.uniform(1.5, 4.5)
    light_keys = look in ("round light", "square light", "tall", "pill") or (look in ("flat", "outlined") and not dark)
    fill: drawing.RGB | None = (238, 239, 243) if light_keys else (58, 60, 68)
    ink: drawing.RGB = (20, 20, 24) if light_keys else (245, 245, 245)
    if look in ("flat", "outlined"):
        fill = None
    if look == "tinted":
        fill, ink = (205, 220, 240), (20, 30, 70)
    if look == "inverse":
        fill, ink = ((20, 22, 26), (250, 250, 250)) if not dark else ((235, 235, 230), (15, 15, 15))
    things = []
    for i, key in enumerate(key_order(rng)):
        row, column = divmod(i, 3)
        x, y = left + (column + 0.5) * cell_w, top + (row + 0.5) * cell_h
        half_w, half_h = cell_w / 2 - gap, cell_h / 2 - gap
        if look.startswith("round"):
            half_w = half_h = min(half_w, half_h)
        if look == "tall":
            half_w *= 0.75
        box = (round(x - half_w), round(y - half_h), round(x + half_w), round(y + half_h))
        if look.startswith("round"):
            draw.ellipse(box, fill=fill)
        elif look == "outlined":
            draw.rounded_rectangle(box, radius=5, outline=(130, 130, 136), width=1)
        elif fill is not None:
            draw.rounded_rectangle(box, radius=int(half_h) if look == "pill" else 4, fill=fill)
        drawn = drawing.segment_glyph(key, size) if segments else drawing.glyph(key, size)
        canvas.paste(ink, (round(x - drawn.width / 2), round(y - drawn.height / 2)), drawn)
        things.append(Thing("key", "", key, round(x), round(y), box))
    if top > 34 and rng.random() < 0.5:
        shown = "".join(rng.choice("0123456789") for _ in range(rng.randint(0, 7)))
        if shown:
            words = drawing.glyph(shown, 16)
            canvas.paste((128, 128, 128), ((SIZE - words.width) // 2, (top - words.height) // 2), words)
    return things


def draw_screen(rng: random.Random, split: Split, kind: Kind, *, most: int = 9) -> Screen:
    """A new screen. Icons screens hold 1 to `most` icons and at times a search field; keypad screens twelve keys."""
    dark = rng.random() < 0.4
    canvas = drawing.background(rng, split, dark)
    if kind == "keypad":
        return _finish(canvas, _keypad(rng, split, canvas, dark), kind)
    things: list[Thing] = []
    top = 0
    if rng.random() < 0.3:
        top = 10
        draw = ImageDraw.Draw(canvas)
        ink = (220, 220, 220) if dark else (60, 60, 60)
        clock = drawing.glyph(f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}", 9)
        canvas.paste(ink, (5, 1), clock)
        draw.rectangle((SIZE - 20, 3, SIZE - 7, 8), outline=ink)
    if rng.random() < 0.4:
        field = _search(rng, canvas, top, dark)
        things.append(field)
        top = field.box[3] + 3
    things += _icons(rng, split, canvas, dark, top, most)
    return _finish(canvas, things, kind)


def _finish(canvas: Image.Image, things: list[Thing], kind: Kind) -> Screen:
    return Screen(np.asarray(canvas), tuple(things), kind)
