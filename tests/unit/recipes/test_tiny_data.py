"""The embedded model's data: deterministic, rightly labelled, and held-out parts really absent from training."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from recipes.tiny import conversations, drawing, layouts, phrases, screens, tones
from recipes.tiny.dialogues import Dialogue
from recipes.tiny.evaluate import is_right
from recipes.tiny.identity import HELD, compose
from recipes.tiny.phrases import normal

SPLITS = ("train", "held")


def fingerprint(dialogue: Dialogue) -> list[object]:
    found: list[object] = [dialogue.thinking, dialogue.system]
    for turn in dialogue.turns:
        found += [turn.text, turn.answer, turn.thought]
        found.append(None if turn.screen is None else turn.screen.pixels.tobytes())
        found.append(None if turn.clip is None else turn.clip.pcm.tobytes())
    return found


@pytest.mark.parametrize("task", [*conversations.EVALUATED, "mixed"])
def test_a_seed_gives_the_same_dialogue_every_time(task: str) -> None:
    maker = {**conversations.TRAINED, **conversations.EVALUATED}[task]
    first, again, other = (maker(random.Random(seed), "held") for seed in (7, 7, 8))
    assert fingerprint(first) == fingerprint(again)
    assert fingerprint(first) != fingerprint(other)


def test_phrasings_of_the_two_splits_are_disjoint() -> None:
    for intent, languages in phrases.PHRASES.items():
        for lang, splits in languages.items():
            shared = {normal(t) for t in splits["train"]} & {normal(t) for t in splits["held"]}
            assert not shared, f"{intent} {lang}: {shared}"


def test_composed_identity_questions_never_contain_a_held_out_one() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = normal(compose(rng, rng.choice(("en", "zh"))))
        assert not any(held in text for held in HELD)


def test_layouts_and_renderings_of_the_two_splits_are_disjoint() -> None:
    assert not {f.__name__ for f in layouts.LAYOUTS["train"]} & {f.__name__ for f in layouts.LAYOUTS["held"]}
    assert not set(layouts.TRAIN_GRIDS) & set(layouts.HELD_GRIDS)
    for table in (
        layouts.RADII,
        drawing.BACKGROUNDS,
        drawing.STYLES,
        screens.KEYPADS,
        screens.GLYPH_SIZES,
        tones.NOISES,
    ):
        assert not set(table["train"]) & set(table["held"])  # type: ignore[call-overload]


def test_training_dialogues_use_no_held_out_phrasing() -> None:
    rng = random.Random(3)
    for intent, languages in phrases.PHRASES.items():
        for lang in ("en", "zh"):
            held = {normal(template) for template in languages[lang]["held"]}
            assert not any(normal(phrases.pick(rng, intent, lang, "train")) in held for _ in range(300)), (intent, lang)


def test_tone_lengths_of_the_two_splits_are_disjoint() -> None:
    rng = random.Random(0)
    drawn = {split: {tones.milliseconds(rng, 50, 250, split) for _ in range(3000)} for split in SPLITS}
    assert not drawn["train"] & drawn["held"]
    assert min(drawn["held"]) <= 57 and max(drawn["held"]) >= 240


@pytest.mark.parametrize("split", SPLITS)
def test_taps_name_exactly_one_thing_and_the_answer_hits_it(split: phrases.Split) -> None:
    rng = random.Random(1)
    present = 0
    for _ in range(150):
        dialogue = conversations.tap(rng, split)
        turn = dialogue.turns[-1]
        wanted = Dialogue(dialogue.task, dialogue.lang, dialogue.turns, False)
        assert is_right(wanted, "", turn.answer)
        if turn.target is None:
            assert turn.answer.startswith("finish(")
            assert not is_right(wanted, "", 'do(action="Tap", element=[500,500])')
            continue
        present += 1
        far = turn.target.x < 112
        assert not is_right(
            wanted, "", f'do(action="Tap", element=[{990 if far else 5},{990 if turn.target.y < 112 else 5}])'
        )
    assert present > 100


@pytest.mark.parametrize("split", SPLITS)
def test_icons_have_the_colour_they_are_said_to_have(split: phrases.Split) -> None:
    rng = random.Random(2)
    for _ in range(40):
        screen = screens.draw_screen(rng, split, "icons")
        for thing in screen.icons:
            below = screen.pixels[thing.y + 1, thing.x]
            hue, spread, _, _ = drawing.PALETTE[thing.colour]
            import colorsys

            seen = colorsys.rgb_to_hsv(*(below / 255.0))[0] * 360
            away = abs((seen - hue + 180) % 360 - 180)
            assert away <= spread + 14, (thing, below)


def test_counts_equal_the_icons_on_the_screen() -> None:
    rng = random.Random(4)
    from recipes.tiny.dialogues import count_turn

    for _ in range(100):
        screen = screens.draw_screen(rng, "train", "icons")
        turn = count_turn(rng, "en", "train", screen)
        name = turn.thought.removeprefix("Count ").split(":")[0]
        words = name.split()
        colour = next((w for w in words if w in phrases.COLOURS), None)
        shape = next((s for s in phrases.SHAPES if words[-1] in (s + "s", s + "es")), None)
        number = sum(
            (colour is None or t.colour == colour) and (shape is None or t.shape == shape) for t in screen.icons
        )
        assert turn.answer == f"I see {number}."


@pytest.mark.parametrize("split", SPLITS)
def test_clips_hold_the_tones_of_their_keys(split: phrases.Split) -> None:
    rng = random.Random(5)
    for _ in range(30):
        keys = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 8)))
        clip = tones.keypad_clip(rng, split, keys)
        assert len(clip.middles) == len(keys) and len(clip.pcm) <= tones.MAX_SAMPLES
        heard = ""
        for middle in clip.middles:
            piece = clip.pcm[middle - 320 : middle + 320]
            seconds = np.arange(len(piece)) / tones.RATE
            power = {
                f: abs(np.sum(piece * np.hanning(len(piece)) * np.exp(-2j * np.pi * f * seconds)))
                for f in tones.LOW + tones.HIGH
            }
            pair = max(tones.LOW, key=power.__getitem__), max(tones.HIGH, key=power.__getitem__)
            heard += next(key for key, tone in tones.PAIRS.items() if tone == pair)
        assert heard == keys


def test_recall_asks_for_a_code_that_was_told_under_that_name() -> None:
    rng = random.Random(6)
    for _ in range(60):
        dialogue = conversations.recall(rng, "held")
        asked = dialogue.turns[-1]
        code = re.search(r"\d+", asked.answer)
        assert code is not None
        said = [turn.text for turn in dialogue.turns[:-1] if code[0] in turn.text]
        assert said, asked
        name = asked.thought.removeprefix("The ").split(" code")[0].split("验证码")[0]
        assert any(name.lower() in text.lower() for text in said)
