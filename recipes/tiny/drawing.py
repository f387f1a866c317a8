"""Pixels: backgrounds, icon styles, keys. Each choice names its split; held-out looks never occur in training."""

from __future__ import annotations

import colorsys
import functools
import math
import random
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes.tiny.layouts import SIZE
from recipes.tiny.phrases import Split

RGB = tuple[int, int, int]
# Hue in degrees and its spread, then the ranges of saturation and value.
PALETTE: Final[dict[str, tuple[float, float, tuple[float, float], tuple[float, float]]]] = {
    "red": (0, 6, (0.78, 1.0), (0.72, 0.97)),
    "orange": (28, 5, (0.82, 1.0), (0.92, 1.0)),
    "yellow": (53, 5, (0.78, 1.0), (0.93, 1.0)),
    "green": (124, 14, (0.6, 1.0), (0.55, 0.85)),
    "cyan": (182, 6, (0.6, 1.0), (0.75, 0.97)),
    "blue": (224, 9, (0.7, 1.0), (0.72, 1.0)),
    "purple": (275, 8, (0.6, 0.95), (0.5, 0.8)),
    "pink": (328, 8, (0.35, 0.62), (0.95, 1.0)),
}
BACKGROUNDS: Final[dict[Split, tuple[str, ...]]] = {
    "train": ("flat", "vertical", "horizontal", "clouds", "stripes", "speckle"),
    "held": ("diagonal", "checker", "vignette"),
}
STYLES: Final[dict[Split, tuple[str, ...]]] = {
    "train": ("flat", "dark outline", "light outline", "tile", "gloss", "round tile", "thick outline"),
    "held": ("shadow", "double outline", "dark tile"),
}


def shade(rng: random.Random, colour: str, split: Split) -> RGB:
    """A shade of `colour`; the band 0.45 < |u| < 0.65 of the hue spread is held out."""
    hue, spread, saturation, value = PALETTE[colour]
    u = rng.uniform(-1, 1)
    in_band = 0.45 < abs(u) < 0.65
    while in_band != (split == "held"):
        u = rng.uniform(-1, 1)
        in_band = 0.45 < abs(u) < 0.65
    red, green, blue = colorsys.hsv_to_rgb(
        ((hue + u * spread) % 360) / 360, rng.uniform(*saturation), rng.uniform(*value)
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def pale(rng: random.Random, dark: bool) -> RGB:
    """A background colour: little saturation, either light or dark."""
    value = rng.uniform(0.08, 0.3) if dark else rng.uniform(0.82, 1.0)
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.3 if dark else 0.16), value)
    return round(red * 255), round(green * 255), round(blue * 255)


def background(rng: random.Random, split: Split, dark: bool) -> Image.Image:
    kind = rng.choice(BACKGROUNDS[split])
    first, second = np.array(pale(rng, dark), np.float32), np.array(pale(rng, dark), np.float32)
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)
    if kind == "flat":
        return Image.new("RGB", (SIZE, SIZE), pale(rng, dark))
    if kind in ("vertical", "horizontal"):
        line = (first + (second - first) * ramp[:, None]).astype(np.uint8)
        grid = line[:, None] if kind == "vertical" else line[None]
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(grid, (SIZE, SIZE, 3))))
    if kind == "stripes":
        width = rng.choice((8, 14, 24))
        line = np.where((np.arange(SIZE) // width % 2)[:, None] == 0, first, second).astype(np.uint8)
        grid = line[:, None] if rng.random() < 0.5 else line[None]
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(grid, (SIZE, SIZE, 3))))
    if kind == "checker":
        cells = np.arange(SIZE) // rng.choice((10, 16, 28)) % 2
        pick = (cells[:, None] ^ cells[None])[..., None]
        return Image.fromarray(np.where(pick == 0, first, second).astype(np.uint8))
    noise = np.random.default_rng(rng.getrandbits(32))
    if kind in ("clouds", "speckle"):
        cells = 6 if kind == "clouds" else 56
        mix = noise.random((cells, cells, 1), np.float32)
        small = Image.fromarray((first + (second - first) * mix).astype(np.uint8))
        return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if kind == "diagonal":
        mix = (ramp[:, None] + ramp[None])[..., None] / 2
    else:
        away = np.hypot(ramp[:, None] - 0.5, ramp[None] - 0.5)[..., None]
        mix = np.clip(away * 1.5, 0, 1)
    return Image.fromarray((first + (second - first) * mix).astype(np.uint8))


def _polygon(shape: str, centre: float, reach: float) -> list[tuple[float, float]]:
    def at(angle: float, length: float) -> tuple[float, float]:
        return centre + length * math.cos(angle), centre + length * math.sin(angle)

    if shape == "square":
        side = reach * 0.84
        return [(centre + a * side, centre + b * side) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    if shape == "triangle":
        return [at(-math.pi / 2 + i * math.tau / 3, reach) for i in range(3)]
    if shape == "diamond":
        return [
            (centre, centre - reach),
            (centre + reach * 0.8, centre),
            (centre, centre + reach),
            (centre - reach * 0.8, centre),
        ]
    if shape == "star":
        return [at(-math.pi / 2 + i * math.tau / 10, reach if i % 2 == 0 else reach * 0.45) for i in range(10)]
    points = []
    for i in range(40):
        t = i * math.tau / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((centre + x / 17 * reach, centre - (y + 2) / 16 * reach))
    return points


@functools.lru_cache(maxsize=4096)
def mask(shape: str, radius: int) -> Image.Image:
    """An antialiased silhouette, `2 * radius + 1` pixels a side."""
    side, scale = 2 * radius + 1, 4
    image = Image.new("L", (side * scale, side * scale))
    draw = ImageDraw.Draw(image)
    centre = side * scale / 2
    if shape == "circle":
        draw.ellipse((scale / 2, scale / 2, side * scale - scale / 2, side * scale - scale / 2), fill=255)
    elif shape == "tile":
        draw.rounded_rectangle((0, 0, side * scale - 1, side * scale - 1), radius=side * scale // 4, fill=255)
    else:
        draw.polygon(_polygon(shape, centre, radius * scale), fill=255)
    return image.resize((side, side), Image.Resampling.BOX)


def _paste(canvas: Image.Image, colour: RGB, silhouette: Image.Image, x: int, y: int) -> None:
    half = silhouette.width // 2
    canvas.paste(colour, (x - half, y - half), silhouette)


def icon(
    canvas: Image.Image,
    style: str,
    shape: str,
    colour: RGB,
    x: int,
    y: int,
    radius: int,
    dark: bool,
    tile: RGB = (228, 230, 236),
) -> None:
    """Draw one icon; the coloured shape stays within `radius` pixels of `(x, y)`."""
    ink: RGB = (240, 240, 240) if dark else (25, 25, 30)
    inner = max(6, radius - 3)
    if style == "flat":
        _paste(canvas, colour, mask(shape, radius), x, y)
    elif style in ("dark outline", "light outline"):
        _paste(canvas, (20, 20, 25) if style == "dark outline" else (250, 250, 250), mask(shape, radius), x, y)
        _paste(canvas, colour, mask(shape, radius - 2), x, y)
    elif style == "thick outline":
        _paste(canvas, ink, mask(shape, radius), x, y)
        _paste(canvas, colour, mask(shape, inner), x, y)
    elif style in ("tile", "dark tile", "round tile"):
        back: RGB = (70, 72, 80) if style == "dark tile" else tile
        _paste(canvas, back, mask("circle" if style == "round tile" else "tile", radius), x, y)
        _paste(canvas, colour, mask(shape, max(6, round(radius * 0.72))), x, y)
    elif style == "gloss":
        _paste(canvas, colour, mask(shape, radius), x, y)
        light = tuple(round(c + (255 - c) * 0.45) for c in colour)
        _paste(canvas, light, mask("circle", max(2, radius // 4)), x, y - radius // 6)  # type: ignore[arg-type]
    elif style == "shadow":
        _paste(canvas, (60, 60, 66) if not dark else (5, 5, 8), mask(shape, inner), x + 2, y + 3)
        _paste(canvas, colour, mask(shape, inner), x, y)
    else:
        _paste(canvas, (250, 250, 250), mask(shape, radius), x, y)
        _paste(canvas, (30, 30, 34), mask(shape, radius - 1), x, y)
        _paste(canvas, colour, mask(shape, inner), x, y)


@functools.lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@functools.lru_cache(maxsize=2048)
def glyph(text: str, size: int) -> Image.Image:
    """A line of text as a silhouette, cropped to its ink."""
    left, top, right, bottom = font(size).getbbox(text)
    image = Image.new("L", (max(1, math.ceil(right - left)), max(1, math.ceil(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font(size))
    return image


_SEGMENTS: Final = {
    "0": "abcdef", "1": "bc", "2": "abged", "3": "abgcd", "4": "fgbc", "5": "afgcd", "6": "afgedc", "7": "abc",
    "8": "abcdefg", "9": "abcdfg",
}  # fmt: skip


@functools.lru_cache(maxsize=512)
def segment_glyph(text: str, size: int) -> Image.Image:
    """A digit as seven segments; `*` and `#` fall back to the font."""
    if text not in _SEGMENTS:
        return glyph(text, size)
    height, width = max(9, round(size * 0.8)), max(6, round(size * 0.48))
    thick = max(1, round(size * 0.12))
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    middle = height // 2
    bars = {
        "a": (0, 0, width - 1, thick - 1), "g": (0, middle - thick // 2, width - 1, middle - thick // 2 + thick - 1),
        "d": (0, height - thick, width - 1, height - 1), "f": (0, 0, thick - 1, middle),
        "b": (width - thick, 0, width - 1, middle),
        "e": (0, middle, thick - 1, height - 1), "c": (width - thick, middle, width - 1, height - 1),
    }  # fmt: skip
    for name in _SEGMENTS[text]:
        draw.rectangle(bars[name], fill=255)
    return image
