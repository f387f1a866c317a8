"""Composed ways to ask who one is, for training: parts from identity.json, less what is held out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Final

from recipes.tiny.phrases import PHRASES, Lang, normal

PARTS: Final[dict[str, list[str]]] = json.loads(Path(__file__).with_name("identity.json").read_text(encoding="utf-8"))
HELD: Final = frozenset(normal(t) for lang in ("en", "zh") for t in PHRASES["identity"][lang]["held"])


def compose(rng: random.Random, lang: Lang) -> str:
    """A composed question that is none of the held-out ones."""
    while True:
        if lang == "en":
            if rng.random() < 0.45:
                text = (
                    rng.choice(PARTS["en_openings"])
                    + rng.choice(PARTS["en_requests"])
                    + rng.choice(PARTS["en_endings"])
                )
            else:
                text = rng.choice(PARTS["en_leads"]) + rng.choice(PARTS["en_who"]) + rng.choice(PARTS["en_tails"])
            text = text[0].upper() + text[1:]
        elif rng.random() < 0.35:
            text = rng.choice(PARTS["zh_openings"]) + rng.choice(PARTS["zh_requests"]) + rng.choice(PARTS["zh_endings"])
        else:
            text = (
                rng.choice(PARTS["zh_leads"])
                + rng.choice(PARTS["zh_you"])
                + rng.choice(PARTS["zh_adverbs"])
                + rng.choice(PARTS["zh_what"])
                + rng.choice(PARTS["zh_tails"])
            )
        if not any(held in normal(text) for held in HELD):
            return text
