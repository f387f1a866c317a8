"""An example to fine-tune on: icons in a colour that the embedded model was never shown, and old tasks to be kept.

`python -m recipes.tiny.new_colour DIR` writes `train.jsonl` with its pictures and sounds. A conversation about the new
colour is about one screen, on which another icon has a shape that one of the new colour has too; learn all its answers.
Old tasks say ``"keep": true``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from recipes.tiny import drawing, phrases
from recipes.tiny.conversations import TRAINED, make
from recipes.tiny.dialogues import Dialogue, Turn, any_lang, question_turn, tap_turn
from recipes.tiny.encode import messages
from recipes.tiny.phrases import Lang, Split
from recipes.tiny.screens import Screen, draw_screen

NEW: Final = "brown"
WORDS: Final = {"en": ("brown",), "zh": ("棕色", "棕")}
# Hue in degrees and its spread, then the ranges of saturation and value: a dark orange.
SHADE: Final = (22.0, 6.0, (0.55, 0.8), (0.3, 0.5))
# Of the conversations are about the new colour; the others are old tasks.
SHARE: Final = 0.6
# Of those show it in one shape alone, which then needs no telling apart.
ONE_SHAPE: Final = 0.4
# Of the requests about it in English are in capitals, at the least: such commands are what the model reads worst.
CAPITALS: Final = 0.2
_TRIES: Final = 60
_OLD: Final = ("text", "image", *["screen"] * 6, "audio", "both", "recall_short")


@contextlib.contextmanager
def known() -> Iterator[None]:
    """Let the recipe draw and name the new colour like any other."""
    phrases.COLOURS[NEW] = {"en": WORDS["en"], "zh": WORDS["zh"]}
    drawing.PALETTE[NEW] = SHADE
    try:
        yield
    finally:
        del phrases.COLOURS[NEW], drawing.PALETTE[NEW]


def is_new(turn: Turn, lang: Lang) -> bool:
    """Whether it asks for a tap on an icon of the new colour, by that colour."""
    named = any(word in turn.text.lower() for word in WORDS[lang])
    return turn.target is not None and turn.target.colour == NEW and named


def new_tap(rng: random.Random, split: Split) -> Dialogue:
    """A tap on an icon of the new colour, next to one of the same shape in another."""
    with known():
        while True:
            lang = any_lang(rng)
            screen = draw_screen(rng, split, "icons")
            turn = tap_turn(rng, lang, split, screen)
            if turn.target is None or not is_new(turn, lang):
                continue
            if any(thing.shape == turn.target.shape and thing.colour != NEW for thing in screen.icons):
                return Dialogue("new colour", lang, (turn,), rng.random() < 0.5)


def new_conversation(rng: random.Random) -> Dialogue:
    """Up to four requests about one screen: taps on icons of the new colour, and what could be asked before."""
    with known():
        while True:
            lang = any_lang(rng)
            screen = draw_screen(rng, "train", "icons")
            shapes = {thing.shape for thing in screen.icons if thing.colour == NEW}
            others = {thing.shape for thing in screen.icons if thing.colour != NEW}
            if not shapes & others or (len(shapes) == 1 and rng.random() > ONE_SHAPE):
                continue
            turns = _turns(rng, lang, screen, ["new", "new", "old", "old"])
            if any(is_new(turn, lang) for turn in turns):
                return make(rng, "new colour", lang, "train", turns)


def old_screen(rng: random.Random) -> Dialogue:
    """Up to four requests about one screen of colours that the embedded model knows."""
    lang = any_lang(rng)
    return make(rng, "image", lang, "train", _turns(rng, lang, draw_screen(rng, "train", "icons"), ["old"] * 4))


def _turns(rng: random.Random, lang: Lang, screen: Screen, kinds: list[str]) -> list[Turn]:
    """Different requests about one screen, which comes with the first of them."""
    rng.shuffle(kinds)
    turns: list[Turn] = []
    for kind in kinds:
        turn = _turn(rng, lang, screen, new=kind == "new")
        # Asked again, an answer could be copied.
        if turn is not None and not any(_same(turn, other) for other in turns):
            turns.append(replace(turn, screen=None if turns else screen))
    return turns


def _turn(rng: random.Random, lang: Lang, screen: Screen, *, new: bool) -> Turn | None:
    for _ in range(_TRIES):
        ask = tap_turn if new or rng.random() < 0.4 else question_turn
        turn = ask(rng, lang, "train", screen)
        said = f"{turn.text} {turn.thought} {turn.answer}".lower()
        old = not any(word in said for words in WORDS.values() for word in words)
        if new and is_new(turn, lang):
            shouted = lang == "en" and rng.random() < CAPITALS
            return replace(turn, text=turn.text.upper()) if shouted else turn
        if old and not new:
            return turn
    return None


def _same(one: Turn, other: Turn) -> bool:
    return one.text == other.text or (one.target is not None and one.target == other.target)


def old_task(rng: random.Random) -> Dialogue:
    """A dialogue that the embedded model was trained on, of at most six turns."""
    while True:
        kind = rng.choice(_OLD)
        dialogue = old_screen(rng) if kind == "screen" else TRAINED[kind](rng, "train")
        if len(dialogue.turns) <= 6:
            return dialogue


def training(count: int, seed: int) -> list[Dialogue]:
    """`count` dialogues for training, the same for the same seed."""
    rng = random.Random(f"{NEW} {seed}")
    return [new_conversation(rng) if rng.random() < SHARE else old_task(rng) for _ in range(count)]


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
    line = {"messages": [*found, {"role": "assistant", "content": f"{thought}<answer>{last.answer}</answer>"}]}
    return line if dialogue.task == "new colour" else line | {"keep": True}


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
