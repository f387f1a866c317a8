"""Penalties on what the answer has, texts that end it, and temperatures next to zero."""

from __future__ import annotations

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.engine.chooser import Chooser
from autoglm_lab.engine.protocol import ReasoningDelta, TextDelta
from autoglm_lab.engine.stop_strings import StopStrings
from autoglm_lab.errors import PolicyError
from autoglm_lab.policy import GenerationPolicy


def chosen(settings: GenerationPolicy, logits: list[float], times: int, prompt: list[int]) -> list[int]:
    chooser = Chooser(settings, prompt, [], "cpu")
    return [chooser.choose(torch.tensor(logits)) for _ in range(times)]


def test_a_frequency_penalty_counts_each_time_in_the_answer_and_not_the_prompt() -> None:
    settings = GenerationPolicy(frequency_penalty=0.2)
    # 0 leads by 0.5 and loses 0.2 each time, so it is chosen three times, then both in turn.
    assert chosen(settings, [1.5, 1.0, -9.0], 6, prompt=[0, 0, 0, 0]) == [0, 0, 0, 1, 0, 1]


def test_a_presence_penalty_counts_once() -> None:
    settings = GenerationPolicy(presence_penalty=0.6)
    assert chosen(settings, [1.5, 1.0, -9.0], 4, prompt=[1]) == [0, 1, 0, 0]


def test_a_negative_penalty_favours_what_is_there() -> None:
    settings = GenerationPolicy(frequency_penalty=-2.0, temperature=0.01, seed=1)
    assert len(set(chosen(settings, [1.0, 1.0], 20, prompt=[1]))) == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    settings = GenerationPolicy(temperature=temperature)
    assert chosen(settings, [80.0, 79.9, -80.0], 3, prompt=[1]) == [0, 0, 0]


@pytest.mark.parametrize("pieces", [["one STOP two"], ["one S", "TO", "P two"], list("one STOP two")])
def test_a_stop_string_is_found_across_pieces_and_left_out(pieces: list[str]) -> None:
    stops = StopStrings(("STOP", "never"))
    shown = [delta.text for piece in pieces for delta in stops.feed([TextDelta(piece)])]
    assert "".join(shown) == stops.text == "one "
    assert stops.found
    assert stops.finish() == []


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end() -> None:
    stops = StopStrings(("STOP",))
    assert stops.feed([TextDelta("one ST")]) == [TextDelta("one ")]
    assert stops.feed([ReasoningDelta("STOP"), TextDelta("ST")]) == [ReasoningDelta("STOP"), TextDelta("ST")]
    assert stops.finish() == [TextDelta("ST")]
    assert not stops.found


def test_the_earliest_stop_string_ends_the_answer(wb: lab.Workbench) -> None:
    whole = wb.chat("Who are you?", conversation="whole").result(60).text
    stop = whole[6:9]
    turn = wb.chat("Who are you?", conversation="cut", stop=[stop, whole[12:16]])
    answer = turn.result(60)
    assert answer.text == turn.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    (said,) = [one.text for one in wb.engine.state.conversations.get("cut").messages if one.role == "assistant"]
    assert said == answer.text


def test_a_penalty_changes_what_the_model_says(wb: lab.Workbench) -> None:
    plain = wb.chat("Who are you?", conversation="a", eos=False, max_new_tokens=60).result(60).text
    other = wb.chat("Who are you?", conversation="b", eos=False, max_new_tokens=60, frequency_penalty=2.0)
    assert other.result(60).text != plain


@pytest.mark.parametrize("stop", [["a", "b", "c", "d", "e"], [""], ["x" * 300]])
def test_stop_strings_are_few_and_short(stop: list[str]) -> None:
    with pytest.raises(PolicyError, match=r"generation\.stop"):
        lab.MemoryPolicy(generation={"stop": stop})
