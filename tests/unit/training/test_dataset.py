from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoglm_lab.errors import DatasetError
from autoglm_lab.training.dataset import check_action, read_dataset

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}


def test_media_are_found_beside_the_file(jsonl: Path) -> None:
    dataset = read_dataset(jsonl)
    (messages,) = dataset
    assert messages[0].parts[0].image.size == (224, 224)  # type: ignore[union-attr]
    assert messages[1].text.startswith("<think>")
    assert dataset.lines == (1,)


def test_a_bad_line_is_left_out_and_named(jsonl: Path) -> None:
    with jsonl.open("a", encoding="utf-8") as file:
        file.write("\n{not json}\n")
        file.write(json.dumps(GOOD) + "\n")
    dataset = read_dataset(jsonl)
    assert (len(dataset), dataset.lines) == (2, (1, 4))
    (problem,) = dataset.problems
    assert problem.line == 3
    assert str(problem).startswith("line 3: it is not JSON")
    assert "1 line(s) left out" in repr(dataset)


def test_strict_makes_a_bad_line_an_error_that_names_it(jsonl: Path) -> None:
    with jsonl.open("a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(DatasetError, match=r"data\.jsonl, line 2: the last message must be the assistant's"):
        read_dataset(jsonl, strict=True)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ([], "it has no list 'messages'"),
        ({"messages": []}, "there are no messages"),
        ({"messages": ["Hi"]}, "a message is an object with 'role' and 'content', not str"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "there is no message of the user"),
        ({"messages": [GOOD["messages"][0], {"role": "assistant", "content": " "}]}, "the last message must be"),
        ({"messages": [{"role": "tool", "content": "x"}, GOOD["messages"][1]]}, "unknown role 'tool'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}, GOOD["messages"][1]]},
            "there is no image file",
        ),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line: object, why: str) -> None:
    dataset = read_dataset([line, GOOD])  # type: ignore[list-item]
    assert len(dataset) == 1
    assert why in str(dataset.problems[0])


def test_no_good_line_at_all_is_an_error_with_the_first_reason() -> None:
    with pytest.raises(DatasetError, match="no dialogue to learn from; line 1: it has no list 'messages'"):
        read_dataset([{}])
    with pytest.raises(DatasetError, match=r"there is no file 'nowhere\.jsonl': give JSON lines"):
        read_dataset("nowhere.jsonl")


@pytest.mark.parametrize(
    "answer",
    [
        'do(action="Tap", element=[0,999])',
        '<think>Hm (maybe).</think><answer>do(action="Swipe", start=[1,2], end=[3, 4])</answer>',
        'finish(message="It says \\"do(x)\\", at [5000,1]")',
        'do(action="Type", text="你好")',
        'do(action="Wait", duration=2)',
        "I see 3.",
        "do you mean this one?",
    ],
)
def test_actions_of_the_phone_agent_and_plain_answers_pass(answer: str) -> None:
    check_action(answer)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ('do(action="Tap", element=[1000,5])', r"\[1000,5\] is outside the screen: coordinates go from 0 to 999"),
        ('do(action="Tap" element=[1,5])', "is not an action"),
        ("do(element=[1,5])", "names no action"),
        ('finish(message="no end', "is not an action"),
    ],
)
def test_a_broken_action_is_refused(answer: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_action(f"<answer>{answer}</answer>")
