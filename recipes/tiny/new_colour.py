"""An example to fine-tune on: icons in a colour that the embedded model was never shown, and old tasks beside them.

`python -m recipes.tiny.new_colour DIR` writes `train.jsonl` with its pictures and sounds. In a question about the new
colour another icon has the same shape, so that the colour decides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from recipes.tiny import drawing, phrases
from recipes.tiny.conversations import TRAINED
from recipes.tiny.dialogues import Dialogue, any_lang, tap_turn
from recipes.tiny.encode import messages
from recipes.tiny.phrases import Split
from recipes.tiny.screens import draw_screen

NEW: Final = "brown"
WORDS: Final = {"en": ("brown",), "zh": ("棕色", "棕")}
# Hue in degrees and its spread, then the ranges of saturation and value: a dark orange.
SHADE: Final = (22.0, 6.0, (0.55, 0.8), (0.3, 0.5))
# Of 100 dialogues: taps on the new colour, other taps on screens that show it, and the rest from the old tasks.
SHARES: Final = (52, 12)
_OLD: Final = ("text", "image", "image", "image", "image", "image", "audio", "both", "recall_short")


@contextlib.contextmanager
def known() -> Iterator[None]:
    """Let the recipe draw and name the new colour like any other."""
    phrases.COLOURS[NEW] = {"en": WORDS["en"], "zh": WORDS["zh"]}
    drawing.PALETTE[NEW] = SHADE
    try:
        yield
    finally:
        del phrases.COLOURS[NEW], drawing.PALETTE[NEW]


def new_tap(rng: random.Random, split: Split) -> Dialogue:
    """A tap on an icon of the new colour, next to one of the same shape in another."""
    with known():
        while True:
            lang = any_lang(rng)
            screen = draw_screen(rng, split, "icons")
            turn = tap_turn(rng, lang, split, screen)
            target = turn.target
            if target is None or target.colour != NEW or not any(word in turn.text.lower() for word in WORDS[lang]):
                continue
            if any(thing.shape == target.shape and thing.colour != NEW for thing in screen.icons):
                return Dialogue("new colour", lang, (turn,), rng.random() < 0.5)


def other_tap(rng: random.Random, split: Split) -> Dialogue:
    """A tap on something else, or on what is not there, on a screen that shows the new colour."""
    with known():
        while True:
            lang = any_lang(rng)
            screen = draw_screen(rng, split, "icons")
            turn = tap_turn(rng, lang, split, screen)
            shown = any(thing.colour == NEW for thing in screen.icons)
            if shown and (turn.target is None or turn.target.colour != NEW):
                return Dialogue("beside the new colour", lang, (turn,), rng.random() < 0.5)


def old_task(rng: random.Random) -> Dialogue:
    """A dialogue that the embedded model was trained on, of at most six turns."""
    while True:
        dialogue = TRAINED[rng.choice(_OLD)](rng, "train")
        if len(dialogue.turns) <= 6:
            return dialogue


def training(count: int, seed: int) -> list[Dialogue]:
    """`count` dialogues for training, the same for the same seed."""
    rng = random.Random(f"{NEW} {seed}")
    found = []
    for _ in range(count):
        roll = rng.randrange(100)
        if roll < SHARES[0]:
            found.append(new_tap(rng, "train"))
        elif roll < sum(SHARES):
            found.append(other_tap(rng, "train"))
        else:
            found.append(old_task(rng))
    return found


def held_out(count: int, seed: int) -> list[Dialogue]:
    """`count` taps on the new colour in looks, layouts and words that training never holds."""
    rng = random.Random(f"held out {NEW} {seed}")
    return [new_tap(rng, "held") for _ in range(count)]


def record(dialogue: Dialogue, folder: Path, name: str) -> dict[str, Any]:
    """One line of the data: the dialogue's messages, pictures and sounds as files in `folder`, the answer last."""
    found = messages(dialogue)
    number = 0
    for message in found:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                file = f"media/{name}-{number}.png"
                part["image"].save(folder / file)
                part["image"] = file
            elif part["type"] == "audio":
                import soundfile

                file = f"media/{name}-{number}.wav"
                soundfile.write(folder / file, np.asarray(part["audio"], np.float32), 16_000, subtype="PCM_16")
                part["audio"] = file
            number += part["type"] != "text"
    last = dialogue.turns[-1]
    thought = f"<think>{last.thought}</think>" if dialogue.thinking else ""
    return {"messages": [*found, {"role": "assistant", "content": f"{thought}<answer>{last.answer}</answer>"}]}


def write(folder: Path, count: int, seed: int = 1) -> Path:
    """Write `count` training dialogues; returns the JSONL file."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    path = folder / "train.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, dialogue in enumerate(training(count, seed)):
            file.write(json.dumps(record(dialogue, folder, f"{number:04d}"), ensure_ascii=False) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    print(write(asked.folder, asked.count, asked.seed))


if __name__ == "__main__":
    main()
