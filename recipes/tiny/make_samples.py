"""Draw the package's sample screens and sounds: `python -m recipes.tiny.make_samples` (prints boxes and centres)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import soundfile

from recipes.tiny.screens import Screen, Thing, draw_screen, thousandths
from recipes.tiny.tones import RATE, Clip, keypad_clip, progress_clip

FOLDER: Final = Path(__file__).parents[2] / "autoglm_lab/samples"


def first_screen(kind: str, wanted: Callable[[Screen], bool]) -> Screen:
    """The screen of the lowest seed that `wanted` accepts."""
    seed = 0
    while not wanted(screen := draw_screen(random.Random(seed), "held", "icons" if kind == "icons" else "keypad")):
        seed += 1
    return screen


def only(screen: Screen, colour: str, shape: str) -> Thing | None:
    """The one icon of this colour and shape, if there is just one."""
    found = [t for t in screen.icons if t.colour == colour and t.shape == shape]
    return found[0] if len(found) == 1 else None


def area(thing: Thing) -> tuple[int, ...]:
    """Its box in thousandths of the screen."""
    return tuple(round(v / 223 * 999) for v in thing.box)


def home(screen: Screen) -> bool:
    has_search = any(thing.kind == "search" for thing in screen.things)
    varied = len({t.colour for t in screen.icons}) >= 5 and len({t.shape for t in screen.icons}) >= 4
    large = bool(screen.icons) and screen.icons[0].radius >= 15
    return has_search and varied and large and only(screen, "red", "circle") is not None


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    screens = {
        "home": first_screen("icons", home),
        "icons": first_screen(
            "icons",
            lambda s: sum(t.colour == "blue" for t in s.icons) == 3 and len(s.icons) == 8 and s.icons[0].radius > 14,
        ),
        "keypad": first_screen(
            "keypad", lambda s: s.things[6].shape == "7" and s.things[0].box[3] - s.things[0].box[1] > 34
        ),
    }
    for name, screen in screens.items():
        screen.image.save(FOLDER / f"{name}.png", optimize=True)
    clips: dict[str, Clip] = {
        "number": keypad_clip(random.Random(3), "held", "4079"),
        "key": next(c for s in range(99) if len((c := keypad_clip(random.Random(s), "held", "7")).pcm) > 0.7 * RATE),
        "busy": progress_clip(random.Random(5), "held", "busy"),
    }
    for name, clip in clips.items():
        soundfile.write(FOLDER / f"{name}.wav", np.round(clip.pcm * 32767).astype(np.int16), RATE, subtype="PCM_16")
    red, seven = only(screens["home"], "red", "circle"), screens["keypad"].things[6]
    if red is not None:
        print("home", area(red), thousandths(red))
    print("keypad", area(seven), thousandths(seven))
    print({name: len(clip.pcm) / RATE for name, clip in clips.items()})


if __name__ == "__main__":
    main()
