"""Dialogues: what a person asks (with a screen, a sound, or neither) and what the model should answer.

Every function takes the generator and the split, so that a dialogue is deterministic by its seed; conversations.py puts
turns together.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from recipes.tiny.identity import compose
from recipes.tiny.phrases import (
    COLOURS,
    CORNERS,
    KEY_WORDS,
    SHAPES,
    Lang,
    Split,
    code_name,
    decorate,
    pick,
    topic,
)
from recipes.tiny.screens import Screen, Thing, thousandths
from recipes.tiny.tones import KEYS, PROGRESS, Clip, keypad_clip, progress_clip, quiet_clip


@dataclass(frozen=True)
class Turn:
    """One question and its answer. `learn` says whether the answer is trained on; `target` is what a tap must hit."""

    text: str
    answer: str
    thought: str
    screen: Screen | None = None
    clip: Clip | None = None
    target: Thing | None = None
    media_last: bool = False
    learn: bool = True


@dataclass(frozen=True)
class Dialogue:
    """A conversation whose last answer is wanted, with a thought before it or not."""

    task: str
    lang: Lang
    turns: tuple[Turn, ...]
    thinking: bool
    system: str | None = None


FIXED: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "identity": {
        "en": (
            "I am AutoGLM-Tiny, a small model that sees screens, hears phone tones and remembers codes.",
            "They ask who I am.",
        ),
        "zh": ("我是 AutoGLM-Tiny，一个会看屏幕、听电话音、记验证码的小模型。", "对方问我是谁。"),
    },
    "hello": {"en": ("Hello! How can I help you?", "A greeting."), "zh": ("你好！有什么可以帮你？", "对方在打招呼。")},
    "thanks": {"en": ("You're welcome!", "They thank me."), "zh": ("不客气！", "对方在道谢。")},
    "ability": {
        "en": (
            "I can tap what you name on a screen, answer questions about it, hear phone tones and remember codes.",
            "They ask what I can do.",
        ),
        "zh": ("我会点击屏幕上的图标、回答屏幕上有什么、听电话音、记验证码。", "对方问我会什么。"),
    },
    "offtask": {
        "en": ("Sorry, I can't do that. I only know small screens, phone tones and codes.", "This is beyond me."),
        "zh": ("抱歉，这个我做不到。我只会看小屏幕、听电话音、记验证码。", "这超出我的能力。"),
    },
    "no screen": {
        "en": ("I see no screen. Please attach one.", "There is no image."),
        "zh": ("我没有看到屏幕，请附上图片。", "没有图片。"),
    },
    "no sound": {
        "en": ("I hear nothing. Please attach a sound.", "There is no audio."),
        "zh": ("我没有听到声音，请附上音频。", "没有音频。"),
    },
    "noted": {"en": ("OK, noted.", "They give me a code."), "zh": ("好的，记住了。", "对方给了我验证码。")},
    "no code": {
        "en": ("You have not told me that code.", "I do not have this code."),
        "zh": ("你还没有告诉我这个验证码。", "我没有这个验证码。"),
    },
    "dial": {"en": ("I hear a dial tone.", "A steady tone."), "zh": ("我听到拨号音。", "连续的长音。")},
    "busy": {"en": ("I hear a busy tone.", "Short beeps."), "zh": ("我听到忙音。", "短促的嘟声。")},
    "ringing": {
        "en": ("I hear a ringing tone.", "A long ring, then silence."),
        "zh": ("我听到回铃音。", "一声长音，然后静音。"),
    },
    "quiet": {"en": ("I hear no tones.", "Only noise."), "zh": ("我没有听到按键音。", "只有噪声。")},
}


def any_lang(rng: random.Random) -> Lang:
    return rng.choice(("en", "zh"))


def ask_for(rng: random.Random, intent: str, lang: Lang, split: Split, **words: str) -> str:
    composed = intent == "identity" and split == "train" and rng.random() < 0.6
    text = compose(rng, lang) if composed else pick(rng, intent, lang, split).format(**words)
    return decorate(rng, text, lang, typos=split == "train")


def fixed_turn(rng: random.Random, intent: str, lang: Lang, split: Split, answer: str | None = None) -> Turn:
    """A turn with one canonical answer a language."""
    reply, thought = FIXED[answer or intent][lang]
    return Turn(ask_for(rng, intent, lang, split, obj=topic(rng, lang), name=code_name(rng, lang)), reply, thought)


def describe(rng: random.Random, lang: Lang, colour: str, shape: str) -> tuple[str, str]:
    """How a person says it, and the canonical name used in answers."""
    if shape == "search":
        said = (
            rng.choice(("search field", "search bar", "search box"))
            if lang == "en"
            else rng.choice(("搜索框", "搜索栏", "搜索条"))
        )
        return said, "search field" if lang == "en" else "搜索框"
    if shape and shape in KEYS:
        word = rng.choice(KEY_WORDS[shape][lang]) if shape in KEY_WORDS else shape
        if lang == "en":
            return rng.choice(
                (
                    f"key {word}",
                    f"{word} key",
                    f"number {word}" if shape.isdigit() else f"{word} button",
                    f"digit {word}" if shape.isdigit() else f"{word} key",
                )
            ), f"key {shape}"
        said = (
            f"{word}键",
            f"按键{word}",
            f"数字{word}" if shape.isdigit() else f"{word}按键",
            f"数字键{word}" if shape.isdigit() else f"{word}键",
        )
        return rng.choice(said), f"{shape}键"
    if lang == "en":
        tint = rng.choice(COLOURS[colour]["en"]) if colour else ""
        if not shape:
            return f"{tint} {rng.choice(('icon', 'one', 'app', 'icon'))}", f"{colour} icon"
        noun = rng.choice(SHAPES[shape]["en"]) if rng.random() < 0.35 else shape
        if rng.random() < 0.1:
            noun += " icon"
        return f"{tint} {noun}".strip(), f"{colour} {shape}".strip()
    tint = rng.choice(COLOURS[colour]["zh"]) if colour else ""
    if not shape:
        return (tint + "的图标" if rng.random() < 0.5 else tint + "图标"), COLOURS[colour]["zh"][0] + "图标"
    noun = rng.choice(SHAPES[shape]["zh"])
    if noun == "圆" and not colour:
        noun = "圆形"
    joint = "的" if tint and rng.random() < 0.4 else ""
    if rng.random() < 0.1:
        noun += "图标"
    return tint + joint + noun, (COLOURS[colour]["zh"][0] if colour else "") + SHAPES[shape]["zh"][0]


def rough_place(thing: Thing, lang: Lang) -> str:
    """Upper left, middle … in thirds of the screen."""
    column, row = min(2, thing.x * 3 // 224), min(2, thing.y * 3 // 224)
    if (column, row) == (1, 1):
        return "middle" if lang == "en" else "中间"
    if lang == "en":
        return ("upper", "middle", "lower")[row] + " " + ("left", "middle", "right")[column]
    return ("左", "", "右")[column] + ("上", "", "下")[row] + "方"


def tap_turn(rng: random.Random, lang: Lang, split: Split, screen: Screen) -> Turn:
    """Tap what is named, once it is unique; else say that it is not there."""
    colour, shape, target = "", "", None
    if rng.random() < 0.18:
        colour, shape = _absent(rng, screen)
    elif screen.kind == "keypad":
        target = rng.choice(screen.things)
        shape = target.shape
    else:
        target = rng.choice(screen.things)
        colour, shape = target.colour, target.shape
        if target.kind == "icon":
            roll = rng.random()
            if roll < 0.12:
                shape = ""
            elif roll < 0.24:
                colour = ""
        same = [t for t in screen.things if (not colour or t.colour == colour) and (not shape or t.shape == shape)]
        if len(same) > 1:
            unique = [
                t for t in screen.things if sum(o.colour == t.colour and o.shape == t.shape for o in screen.things) == 1
            ]
            if not unique:
                target, (colour, shape) = None, _absent(rng, screen)
            else:
                target = rng.choice(unique)
                colour, shape = target.colour, target.shape
    said, name = describe(rng, lang, colour, shape)
    text = ask_for(rng, "tap", lang, split, obj=said)
    if target is None:
        if lang == "en":
            return Turn(text, f'finish(message="There is no {name}.")', f"No {name} here.", screen)
        return Turn(text, f'finish(message="没有{name}。")', f"屏幕上没有{name}。", screen)
    x, y = thousandths(target)
    thought = (
        f"The {name} is in the {rough_place(target, 'en')}."
        if lang == "en"
        else f"{name}在{rough_place(target, 'zh')}。"
    )
    return Turn(text, f'do(action="Tap", element=[{x},{y}])', thought, screen, target=target)


def _absent(rng: random.Random, screen: Screen) -> tuple[str, str]:
    """A colour and shape that the screen lacks; mostly each of them occurs in other icons."""
    roll = rng.random()
    if screen.kind == "icons" and roll < 0.1:
        return "", rng.choice(KEYS)
    if roll < 0.2 and all(thing.kind != "search" for thing in screen.things):
        return "", "search"
    # A dict, not a set: its order does not depend on the process.
    there = dict.fromkeys((thing.colour, thing.shape) for thing in screen.icons)
    colours = [c for c, _ in there] if there and rng.random() < 0.6 else list(COLOURS)
    shapes = [s for _, s in there] if there and rng.random() < 0.6 else list(SHAPES)
    for _ in range(20):
        found = rng.choice(colours), rng.choice(shapes)
        if found not in there:
            return found
    return rng.choice([(c, s) for c in COLOURS for s in SHAPES if (c, s) not in there])


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("x", "s")) else "s")


def count_turn(rng: random.Random, lang: Lang, split: Split, screen: Screen) -> Turn:
    colour, shape = "", ""
    icons = screen.icons
    roll = rng.random()
    if roll < 0.12 or not icons:
        colour, shape = _absent(rng, Screen(screen.pixels, screen.icons, "keypad"))
        colour, shape = (colour or "red", shape) if shape in SHAPES else ("red", "circle")
    elif roll < 0.8:
        model = rng.choice(icons)
        colour = model.colour if roll < 0.6 else ""
        shape = model.shape if roll < 0.36 or roll >= 0.6 else ""
    number = sum((not colour or t.colour == colour) and (not shape or t.shape == shape) for t in icons)
    if lang == "en":
        tint = rng.choice(COLOURS[colour]["en"]) if colour else ""
        noun = plural(rng.choice(SHAPES[shape]["en"]) if rng.random() < 0.35 else shape) if shape else "icons"
        said, name = f"{tint} {noun}".strip(), f"{colour} {plural(shape) if shape else 'icons'}".strip()
        return Turn(
            ask_for(rng, "count", lang, split, obj=said), f"I see {number}.", f"Count {name}: {number}.", screen
        )
    said, name = describe(rng, lang, colour, shape) if colour or shape else ("图标", "图标")
    return Turn(ask_for(rng, "count", lang, split, obj=said), f"有{number}个。", f"数{name}：{number}。", screen)


def name_of(thing: Thing, lang: Lang) -> str:
    if lang == "zh":
        return COLOURS[thing.colour]["zh"][0] + SHAPES[thing.shape]["zh"][0]
    return f"{thing.colour} {thing.shape}"


def corner_turn(rng: random.Random, lang: Lang, split: Split, screen: Screen) -> Turn | None:
    """What is nearest to a corner, if one icon is clearly nearer than the others."""
    corner = rng.choice(list(CORNERS))
    sign_x, sign_y = (1 if "left" in corner else -1), (1 if "top" in corner else -1)
    ranked = sorted(screen.icons, key=lambda t: sign_x * t.x + sign_y * t.y)
    if len(ranked) < 2:
        return None
    first, second = ranked[:2]
    if sign_x * (second.x - first.x) + sign_y * (second.y - first.y) < 24:
        return None
    if sign_x * (first.x - 112) > 10 or sign_y * (first.y - 112) > 10:
        return None
    text = ask_for(rng, "corner", lang, split, obj=rng.choice(CORNERS[corner][lang]))
    name = name_of(first, lang)
    if lang == "en":
        return Turn(text, f"A{'n' if name[0] in 'aeiou' else ''} {name}.", f"Look {corner}: {name}.", screen)
    return Turn(text, f"{name}。", f"看{CORNERS[corner]['zh'][0]}：{name}。", screen)


def exists_turn(rng: random.Random, lang: Lang, split: Split, screen: Screen) -> Turn:
    if screen.icons and rng.random() < 0.5:
        thing = rng.choice(screen.icons)
        colour, shape, there = thing.colour, thing.shape, True
    else:
        colour, shape = _absent(rng, Screen(screen.pixels, screen.icons, "keypad"))
        while shape not in SHAPES:
            colour, shape = _absent(rng, Screen(screen.pixels, screen.icons, "keypad"))
        there = False
    said, name = describe(rng, lang, colour, shape)
    text = ask_for(rng, "exists", lang, split, obj=said)
    if lang == "en":
        return Turn(text, "Yes." if there else "No.", f"{'There is a' if there else 'No'} {name}.", screen)
    return Turn(text, "有。" if there else "没有。", f"{'有' if there else '没有'}{name}。", screen)


def attribute_turn(rng: random.Random, lang: Lang, split: Split, screen: Screen) -> Turn | None:
    """The colour of the only star, or the shape of the only red icon."""
    colour_wanted = rng.random() < 0.5
    pool = [t.shape if colour_wanted else t.colour for t in screen.icons]
    unique = [t for t in screen.icons if pool.count(t.shape if colour_wanted else t.colour) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    if colour_wanted:
        said, _ = describe(rng, lang, "", thing.shape)
        text = ask_for(rng, "colour_of", lang, split, obj=said)
        if lang == "en":
            return Turn(text, f"{thing.colour.capitalize()}.", f"The {thing.shape}: {thing.colour}.", screen)
        return Turn(
            text,
            f"{COLOURS[thing.colour]['zh'][0]}。",
            f"{SHAPES[thing.shape]['zh'][0]}：{COLOURS[thing.colour]['zh'][0]}。",
            screen,
        )
    text = ask_for(rng, "shape_of", lang, split, obj=rng.choice(COLOURS[thing.colour][lang]))
    if lang == "en":
        return Turn(text, f"A {thing.shape}.", f"The {thing.colour} icon: {thing.shape}.", screen)
    return Turn(
        text,
        f"{SHAPES[thing.shape]['zh'][0]}。",
        f"{COLOURS[thing.colour]['zh'][0]}图标：{SHAPES[thing.shape]['zh'][0]}。",
        screen,
    )


def question_turn(rng: random.Random, lang: Lang, split: Split, screen: Screen) -> Turn:
    """Any question about a screen of icons."""
    while True:
        roll = rng.random()
        turn: Turn | None
        if roll < 0.4:
            turn = count_turn(rng, lang, split, screen)
        elif roll < 0.65:
            turn = corner_turn(rng, lang, split, screen)
        elif roll < 0.8:
            turn = exists_turn(rng, lang, split, screen)
        else:
            turn = attribute_turn(rng, lang, split, screen)
        if turn is not None:
            return turn


def sound_turn(rng: random.Random, lang: Lang, split: Split, *, strange: float = 0.1) -> Turn:
    """Digits to type, or a call progress tone to name."""
    text = ask_for(rng, "dtmf", lang, split)
    roll = rng.random()
    if roll < strange:
        kind = rng.choice(PROGRESS)
        return Turn(text, *FIXED[kind][lang], clip=progress_clip(rng, split, kind))
    if split == "train" and roll < strange + 0.02:
        return Turn(text, *FIXED["quiet"][lang], clip=quiet_clip(rng, split))
    alphabet = KEYS if split == "train" and rng.random() < 0.1 else "0123456789"
    length = rng.randint(3, 8) if split == "held" or rng.random() < 0.88 else rng.randint(1, 2)
    keys = "".join(rng.choice(alphabet) for _ in range(length))
    if rng.random() < 0.15:
        # Doubled digits are where a short gap is easily lost.
        spot = rng.randrange(length)
        keys = keys[:spot] + keys[max(0, spot - 1)] + keys[spot + 1 :]
    thought = f"I hear {' '.join(keys)}." if lang == "en" else f"听到{'、'.join(keys)}。"
    return Turn(text, f'do(action="Type", text="{keys}")', thought, clip=keypad_clip(rng, split, keys))


def key_turn(rng: random.Random, lang: Lang, split: Split, screen: Screen) -> Turn:
    """Tap the key that is heard."""
    target = rng.choice(screen.things)
    x, y = thousandths(target)
    where = rough_place(target, lang)
    key = target.shape
    thought = f"I hear {key}. The key {key} is in the {where}." if lang == "en" else f"听到{key}。{key}键在{where}。"
    return Turn(
        ask_for(rng, "trimodal", lang, split), f'do(action="Tap", element=[{x},{y}])', thought, screen,
        keypad_clip(rng, split, key), target,
    )  # fmt: skip
