"""Whole conversations by task: one question, several turns on one screen, codes told and asked for, all mixed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from recipes.tiny.dialogues import (
    FIXED,
    Dialogue,
    Turn,
    any_lang,
    ask_for,
    fixed_turn,
    key_turn,
    question_turn,
    sound_turn,
    tap_turn,
)
from recipes.tiny.phrases import SYSTEM_PROMPTS, Lang, Split, code_name, pick, topic
from recipes.tiny.screens import draw_screen

Maker = Callable[[random.Random, Split], Dialogue]


def make(rng: random.Random, task: str, lang: Lang, split: Split, turns: list[Turn]) -> Dialogue:
    """A dialogue that thinks half of the time; in training a system prompt stands before it at times."""
    system = rng.choice(SYSTEM_PROMPTS) if split == "train" and rng.random() < 0.1 else None
    return Dialogue(task, lang, tuple(turns), rng.random() < 0.5, system)


def small_talk(rng: random.Random, lang: Lang, split: Split) -> Turn:
    """A turn with no screen, sound or code in it."""
    roll = rng.random()
    if roll < 0.22:
        return fixed_turn(rng, "identity", lang, split)
    if roll < 0.5:
        return fixed_turn(rng, rng.choice(("hello", "thanks", "ability")), lang, split)
    return fixed_turn(rng, "offtask", lang, split)


def identity(rng: random.Random, split: Split) -> Dialogue:
    lang = any_lang(rng)
    turns = [small_talk(rng, lang, split)] if split == "train" and rng.random() < 0.15 else []
    return make(rng, "identity", lang, split, [*turns, fixed_turn(rng, "identity", lang, split)])


def offtask(rng: random.Random, split: Split) -> Dialogue:
    lang = any_lang(rng)
    return make(rng, "offtask", lang, split, [fixed_turn(rng, "offtask", lang, split)])


def text(rng: random.Random, split: Split) -> Dialogue:
    """Training's short texts: who it is, small talk, refusals, and honest answers when an attachment is missing."""
    lang = any_lang(rng)
    turns = [small_talk(rng, any_lang(rng), split)] if rng.random() < 0.2 else []
    roll = rng.random()
    if roll < 0.34:
        last = fixed_turn(rng, "identity", lang, split)
    elif roll < 0.5:
        last = fixed_turn(rng, rng.choice(("hello", "thanks", "ability")), lang, split)
    elif roll < 0.78:
        last = fixed_turn(rng, "offtask", lang, split)
    elif roll < 0.88:
        screen = draw_screen(rng, split, rng.choice(("icons", "keypad")), most=4)
        asked = (
            tap_turn(rng, lang, split, screen)
            if rng.random() < 0.6 or not screen.icons
            else question_turn(rng, lang, split, screen)
        )
        last = Turn(asked.text, *FIXED["no screen"][lang])
    elif roll < 0.94:
        last = Turn(ask_for(rng, "dtmf", lang, split), *FIXED["no sound"][lang])
    else:
        intent = rng.choice(("recall", "recall_only"))
        last = Turn(ask_for(rng, intent, lang, split, name=code_name(rng, lang)), *FIXED["no code"][lang])
    return make(rng, "text", lang, split, [*turns, last])


def tap(rng: random.Random, split: Split) -> Dialogue:
    lang = any_lang(rng)
    screen = draw_screen(rng, split, "keypad" if rng.random() < 0.2 else "icons")
    return make(rng, "tap", lang, split, [tap_turn(rng, lang, split, screen)])


def screen(rng: random.Random, split: Split) -> Dialogue:
    lang = any_lang(rng)
    return make(rng, "screen", lang, split, [question_turn(rng, lang, split, draw_screen(rng, split, "icons"))])


def image(rng: random.Random, split: Split) -> Dialogue:
    """Training: one to three requests about one screen, the screen with the first or second of them."""
    lang = any_lang(rng)
    shown = draw_screen(rng, split, "keypad" if rng.random() < 0.15 else "icons")
    turns = [small_talk(rng, lang, split)] if rng.random() < 0.08 else []
    for i in range(rng.choice((1, 1, 2, 2, 3))):
        if rng.random() < 0.1:
            lang = any_lang(rng)
        ask = tap_turn if shown.kind == "keypad" or rng.random() < 0.45 else question_turn
        turn = ask(rng, lang, split, shown)
        turns.append(
            Turn(turn.text, turn.answer, turn.thought, shown if i == 0 else None, None, turn.target, rng.random() < 0.1)
        )
    return make(rng, "image", lang, split, turns)


def dtmf(rng: random.Random, split: Split) -> Dialogue:
    lang = any_lang(rng)
    turn = sound_turn(rng, lang, split)
    if split == "train" and rng.random() < 0.1:
        turn = Turn(turn.text, turn.answer, turn.thought, None, turn.clip, media_last=True)
    turns = [small_talk(rng, lang, split)] if split == "train" and rng.random() < 0.08 else []
    return make(rng, "dtmf", lang, split, [*turns, turn])


def trimodal(rng: random.Random, split: Split) -> Dialogue:
    lang = any_lang(rng)
    turn = key_turn(rng, lang, split, draw_screen(rng, split, "keypad"))
    if split == "train" and rng.random() < 0.1:
        turn = Turn(turn.text, turn.answer, turn.thought, turn.screen, turn.clip, turn.target, media_last=True)
    return make(rng, "trimodal", lang, split, [turn])


def _code(rng: random.Random, split: Split, length: int | None = None) -> str:
    """Digits; a repeated one, as in 8868 or 000, is where copying slips, so training has more of them."""
    if length is None:
        length = rng.choice((3, 4, 4, 4, 5, 6, 6, 6, 8))
    code = [rng.choice("0123456789") for _ in range(length)]
    if split == "train" and rng.random() < 0.25:
        for _ in range(rng.randint(1, 2)):
            spot = rng.randrange(1, length)
            code[spot] = code[spot - 1]
    return "".join(code)


def _filler(rng: random.Random, lang: Lang, split: Split) -> Turn:
    """A distracting turn; at times a pasted text with numbers in it that are not codes."""
    if rng.random() < 0.72:
        return small_talk(rng, lang, split)
    numbers = lambda: "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 6)))  # noqa: E731
    joint = ", " if lang == "en" else "，"
    words = [topic(rng, lang) + (f" {numbers()}" if rng.random() < 0.3 else "") for _ in range(rng.randint(3, 14))]
    return Turn(pick(rng, "offtask", lang, split).format(obj=joint.join(words)), *FIXED["offtask"][lang])


def _tokens(turn: Turn) -> int:
    """A rough count of the tokens that a turn of text takes."""
    text = turn.text + turn.answer
    return 8 + sum(1.2 if ord(c) > 127 else 0.33 for c in text).__ceil__()


def _names(rng: random.Random, lang: Lang, count: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = code_name(rng, lang)
        if name not in names:
            names.append(name)
    return names


def _tell(rng: random.Random, lang: Lang, split: Split, codes: dict[str, str], listed: float) -> list[Turn]:
    """Turns that give the codes: sentences, one to three a turn, or (in training) a bare list of names and codes."""
    told: list[Turn] = []
    pending = list(codes)
    if rng.random() < listed:
        colon = rng.choice((": ", " ", " = ", " is ")) if lang == "en" else rng.choice(("：", "", "是", "，"))
        joint = rng.choice((", ", "; ", ". ")) if lang == "en" else rng.choice(("，", "；", "。"))
        return [Turn(joint.join(name + colon + codes[name] for name in pending), *FIXED["noted"][lang])]
    while pending:
        together = pending[: rng.choice((1, 1, 1, 2, 3))]
        pending = pending[len(together) :]
        text = (" " if lang == "en" else "，").join(
            ask_for(rng, "tell", lang, split, name=name, code=codes[name]).rstrip("。?？") for name in together
        )
        told.append(Turn(text, *FIXED["noted"][lang]))
    return told


def _question(rng: random.Random, lang: Lang, split: Split, name: str, code: str, *, alone: bool = False) -> Turn:
    intent = "recall_only" if alone else "recall"
    asked = ask_for(rng, intent, lang, split, name=name)
    if lang == "en":
        return Turn(asked, f"The code is {code}.", f"The {name} code: {code}.")
    return Turn(asked, f"验证码是{code}。", f"{name}验证码：{code}。")


def recall_within(
    rng: random.Random, split: Split, budget: int, asks: int, count: int | None = None, listed: float = 0.0
) -> Dialogue:
    """Codes told, distracting turns up to about `budget` tokens in all, then `asks` questions about the codes."""
    lang = any_lang(rng)
    if count is None:
        count = rng.choice((1, 2, 2, 3, 3, 4, 5)) if budget > 120 else rng.choice((1, 1, 2))
    codes = {name: _code(rng, split) for name in _names(rng, lang, count)}
    if split == "train" and rng.random() < 0.7:
        # Codes of one length, or the length alone gives half of the answers away and names are never looked at.
        length = rng.choice((3, 4, 4, 5, 6, 6))
        codes = {name: _code(rng, split, length) for name in codes}
    told = _tell(rng, lang, split, codes, listed)
    used = sum(map(_tokens, told)) + 30 * asks
    turns = list(told)
    start = rng.randint(0, 2) if rng.random() < 0.3 else 0
    while True:
        filler = _filler(rng, lang if rng.random() < 0.9 else any_lang(rng), split)
        used += _tokens(filler)
        if used > budget:
            break
        # Most of it comes after the codes, so that they lie far back.
        turns.insert(len(turns) if rng.random() < 0.75 else rng.randint(min(start, len(turns)), len(turns)), filler)
    turns = [Turn(t.text, t.answer, t.thought, learn=rng.random() < 0.05) for t in turns]
    wanted = rng.sample(list(codes), min(asks, count))
    for i, name in enumerate(wanted):
        if split == "train" and i + 1 < len(wanted) and rng.random() < 0.05:
            other = code_name(rng, lang)
            if other not in codes:
                turns.append(Turn(ask_for(rng, "recall", lang, split, name=other), *FIXED["no code"][lang]))
        turns.append(_question(rng, lang, split, name, codes[name], alone=count == 1 and rng.random() < 0.5))
    return make(rng, "recall", lang, split, turns)


def recall(rng: random.Random, split: Split) -> Dialogue:
    """Held-out form: up to about 1,000 tokens, one question."""
    return recall_within(rng, split, rng.choice((60, 150, 300, 500, 700, 850, 950)), 1)


def recall_short(rng: random.Random, split: Split) -> Dialogue:
    """Many codes close together: which code belongs to which name is learnt here, and carries over to long ones."""
    count = rng.choice((1, 2, 3, 4, 5, 6, 7, 8))
    return recall_within(rng, split, rng.randint(60, 200), 4, count, 0.5)


def recall_long(rng: random.Random, split: Split) -> Dialogue:
    return recall_within(rng, split, rng.randint(200, 1000), 4, rng.choice((1, 2, 3, 4, 5, 6)), 0.2)


def mixed(rng: random.Random, split: Split) -> Dialogue:
    """Screen, sound, codes and talk in one conversation, one screen and one sound at most."""
    lang = any_lang(rng)
    shown = draw_screen(rng, split, rng.choice(("icons", "icons", "keypad")))
    turns: list[Turn] = []
    parts = ["screen", "sound", "talk", "code"]
    rng.shuffle(parts)
    for part in parts[: rng.randint(2, 4)]:
        if part == "talk":
            turns.append(small_talk(rng, lang, split))
        elif part == "screen" and shown.kind == "keypad" and "sound" not in parts[: len(turns)] and rng.random() < 0.5:
            turns.append(tap_turn(rng, lang, split, shown))
        elif part == "screen":
            for i in range(rng.randint(1, 2)):
                ask = tap_turn if shown.kind == "keypad" or rng.random() < 0.5 else question_turn
                turn = ask(rng, lang, split, shown)
                turns.append(turn if i == 0 else Turn(turn.text, turn.answer, turn.thought))
        elif part == "sound":
            turns.append(sound_turn(rng, lang, split))
        else:
            name, code = code_name(rng, lang), _code(rng, split)
            turns.append(Turn(ask_for(rng, "tell", lang, split, name=name, code=code), *FIXED["noted"][lang]))
            turns += [small_talk(rng, lang, split)] if rng.random() < 0.5 else []
            turns.append(_question(rng, lang, split, name, code))
    return make(rng, "mixed", lang, split, turns)


EVALUATED: Final[dict[str, Maker]] = {
    "identity": identity, "tap": tap, "screen": screen, "dtmf": dtmf, "trimodal": trimodal, "recall": recall,
    "offtask": offtask,
}  # fmt: skip
TRAINED: Final[dict[str, Maker]] = {
    "text": text, "image": image, "audio": dtmf, "both": trimodal, "recall_short": recall_short,
    "recall_long": recall_long,
    "mixed": mixed,
}  # fmt: skip
