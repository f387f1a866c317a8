"""What people say: templates by intent, language and split.

phrases.json holds `{intent: {language: {"train" | "held": templates}}}`, words.json the words they are filled with. The two
splits are disjoint; a test holds that. `{obj}`, `{name}`, `{code}` are filled by dialogues.py and conversations.py.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Final, Literal

Lang = Literal["en", "zh"]
Split = Literal["train", "held"]

COLOURS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "red": {"en": ("red",), "zh": ("红色", "红")},
    "orange": {"en": ("orange",), "zh": ("橙色", "橙")},
    "yellow": {"en": ("yellow",), "zh": ("黄色", "黄")},
    "green": {"en": ("green",), "zh": ("绿色", "绿")},
    "cyan": {"en": ("cyan", "teal"), "zh": ("青色", "青")},
    "blue": {"en": ("blue",), "zh": ("蓝色", "蓝")},
    "purple": {"en": ("purple", "violet"), "zh": ("紫色", "紫")},
    "pink": {"en": ("pink",), "zh": ("粉色", "粉红色")},
}
SHAPES: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "circle": {"en": ("circle", "dot", "disc"), "zh": ("圆形", "圆", "圆圈")},
    "square": {"en": ("square", "box"), "zh": ("方形", "正方形", "方块")},
    "triangle": {"en": ("triangle",), "zh": ("三角形", "三角")},
    "star": {"en": ("star",), "zh": ("星形", "星星", "五角星")},
    "heart": {"en": ("heart",), "zh": ("心形", "爱心", "心")},
    "diamond": {"en": ("diamond", "rhombus"), "zh": ("菱形",)},
}
CORNERS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "top left": {"en": ("top left", "upper left", "top-left"), "zh": ("左上角", "左上方")},
    "top right": {"en": ("top right", "upper right", "top-right"), "zh": ("右上角", "右上方")},
    "bottom left": {"en": ("bottom left", "lower left", "bottom-left"), "zh": ("左下角", "左下方")},
    "bottom right": {"en": ("bottom right", "lower right", "bottom-right"), "zh": ("右下角", "右下方")},
}
KEY_WORDS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "*": {"en": ("*", "star"), "zh": ("*", "星号")},
    "#": {"en": ("#", "hash"), "zh": ("#", "井号")},
}


def _load(name: str) -> Any:
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


PHRASES: Final[dict[str, dict[str, dict[str, list[str]]]]] = _load("phrases.json")
_WORDS: Final[dict[str, Any]] = _load("words.json")
TOPICS: Final[dict[str, list[str]]] = _WORDS["topics"]
CODE_NAMES: Final[dict[str, list[str]]] = _WORDS["code_names"]
PREFIXES: Final[dict[str, dict[str, list[str]]]] = _WORDS["prefixes"]
SYSTEM_PROMPTS: Final[list[str]] = _WORDS["system_prompts"]


def normal(text: str) -> str:
    """Letters and digits only, in lower case: what two phrasings are compared by."""
    return "".join(c for c in text.lower() if c.isalnum())


def pick(rng: random.Random, intent: str, lang: Lang, split: Split) -> str:
    """One template of `intent` from one split only, at times with a polite opening."""
    held = {normal(template) for template in PHRASES[intent][lang]["held"]} if split == "train" else set()
    while True:
        text = rng.choice(PHRASES[intent][lang][split])
        if rng.random() < 0.15:
            prefix = rng.choice(PREFIXES[lang][split])
            text = prefix + (text[0].lower() + text[1:] if lang == "en" and text[:2] not in ("I ", "I'") else text)
        # "Please, " before a training template can make a held-out one.
        if normal(text) not in held:
            return text


def decorate(rng: random.Random, text: str, lang: Lang, *, typos: bool) -> str:
    """Vary case, final punctuation and width, and now and then a typo, without touching digits."""
    roll = rng.random()
    if lang == "en":
        if roll < 0.2:
            text = text.lower()
        elif roll < 0.28:
            text = text.upper()
    roll = rng.random()
    if roll < 0.25:
        text = text.rstrip("?.!。？！")
    elif roll < 0.32:
        text = text.rstrip("?.!。？！") + rng.choice(
            ("!", "！", "...", "??", "。", " ", "?!") if lang == "zh" else ("!", "...", "??", " ", ".", "?!")
        )
    elif roll < 0.45 and lang == "zh":
        text = text.replace("？", "?").replace("，", ",").replace("。", ".").replace("：", ":")
    if typos and lang == "en" and rng.random() < 0.06:
        text = typo(rng, text)
    return text


def typo(rng: random.Random, text: str) -> str:
    """Drop, double or swap one inner letter; digits stay."""
    spots = [i for i in range(1, len(text) - 1) if text[i].isascii() and text[i].isalpha() and text[i + 1].isalpha()]
    if not spots:
        return text
    i, kind = rng.choice(spots), rng.random()
    if kind < 0.35:
        return text[:i] + text[i + 1 :]
    if kind < 0.65:
        return text[:i] + text[i] + text[i:]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def topic(rng: random.Random, lang: Lang) -> str:
    """Something that people talk about; at times words nobody listed, so that refusing does not hang on the list."""
    roll = rng.random()
    if roll < 0.6:
        return rng.choice(TOPICS[lang])
    if roll < 0.75:
        return rng.choice(TOPICS[lang]) + (" and " if lang == "en" else "和") + rng.choice(TOPICS[lang])
    if lang == "zh":
        return "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(1, 5)))
    return " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 3)))


def pseudo_word(rng: random.Random) -> str:
    return "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "s", "t", "l"))
        for _ in range(rng.randint(1, 3))
    )


def code_name(rng: random.Random, lang: Lang) -> str:
    if rng.random() < 0.8:
        return rng.choice(CODE_NAMES[lang])
    if lang == "en":
        return pseudo_word(rng)
    return rng.choice(TOPICS["zh"])
