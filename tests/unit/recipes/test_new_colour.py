from __future__ import annotations

import json
from pathlib import Path

from autoglm_lab.training.dataset import read_dataset
from recipes.tiny import drawing, new_colour, phrases

COUNT = 40


def test_conversations_ask_for_the_new_colour_and_for_what_was_known() -> None:
    dialogues = new_colour.training(COUNT, 5)
    assert [d.turns[0].text for d in dialogues] == [d.turns[0].text for d in new_colour.training(COUNT, 5)]
    new = [d for d in dialogues if d.task == "new colour"]
    assert 0.4 * COUNT < len(new) < 0.8 * COUNT
    for dialogue in new:
        asked = [new_colour.is_new(turn, dialogue.lang) for turn in dialogue.turns]
        assert any(asked)
        screen = dialogue.turns[0].screen
        assert screen is not None
        assert all(turn.screen is None for turn in dialogue.turns[1:])
        brown, others = ({i.shape for i in screen.icons if (i.colour == "brown") is one} for one in (True, False))
        assert brown & others
        targets = [turn.target for turn in dialogue.turns if turn.target is not None]
        assert len({id(target) for target in targets}) == len(targets)
        for turn, is_new in zip(dialogue.turns, asked, strict=True):
            said = f"{turn.text} {turn.answer} {turn.thought}".lower()
            assert is_new == any(word in said for words in new_colour.WORDS.values() for word in words)
    assert any(len(dialogue.turns) > 2 for dialogue in new)


def test_the_recipe_itself_does_not_know_the_new_colour() -> None:
    new_colour.training(3, 1)
    assert new_colour.NEW not in phrases.COLOURS
    assert new_colour.NEW not in drawing.PALETTE


def test_what_was_known_is_marked_as_kept(tmp_path: Path) -> None:
    path = new_colour.write(tmp_path, COUNT, 5)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    data = read_dataset(path, strict=True)
    assert data.kept == tuple(d.task != "new colour" for d in new_colour.training(COUNT, 5))
    assert [line.get("keep", False) for line in lines] == list(data.kept)
