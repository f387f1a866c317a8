"""Captured decode steps: the same answers as without, through batches, parks, precisions and places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import autoglm_lab as lab
from autoglm_lab.units import MiB

QUESTIONS = ["Who are you?", "你是谁?", "Tap the red circle", "How many circles are there?", "again"]


@pytest.fixture(scope="module")
def wb() -> Iterator[lab.Workbench]:
    with lab.load("autoglm-tiny", device="cuda", dtype="float32") as workbench:
        workbench.policy = workbench.policy.replace(kv={"prefix_bytes": 0, "reuse": False})
        yield workbench


def answers(wb: lab.Workbench, **kv: Any) -> list[str]:
    """The questions, all at once."""
    wb.policy = wb.policy.replace(kv=kv)
    turns = [wb.chat(text, conversation=text, max_new_tokens=48) for text in QUESTIONS]
    texts = [turn.result(120).text for turn in turns]
    for text in QUESTIONS:
        wb.drop(text)
    return texts


def test_graphs_change_no_token_alone_or_together(wb: lab.Workbench) -> None:
    expected = answers(wb, graphs=False)
    assert answers(wb, graphs=True) == expected
    alone = [wb.chat(text, conversation="alone " + text, max_new_tokens=48).result(60).text for text in QUESTIONS]
    assert alone == expected
    captured = [event for event in wb.events if event.subject == "decode graphs"]
    assert captured
    assert not any("cannot be captured" in event.why for event in captured)


def test_a_graph_is_right_after_its_weights_were_away(wb: lab.Workbench) -> None:
    expected = answers(wb, graphs=True)
    for name in wb.modules:
        wb.modules[name].park().result(60)
    assert answers(wb) == expected


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_graphs_read_fewer_bits_as_steps_without_do(wb: lab.Workbench, precision: str) -> None:
    expected = answers(wb, graphs=False, precision=precision)
    assert answers(wb, graphs=True) == expected
    wb.policy = wb.policy.replace(kv={"precision": "model"})


def test_keys_and_values_on_the_host_give_the_same_answers(wb: lab.Workbench) -> None:
    expected = answers(wb, graphs=True, place="device")
    assert answers(wb, place="host") == expected
    turn = wb.chat("Who are you?", conversation="kept on the host", max_new_tokens=8)
    turn.result(60)
    ledger = wb.memory
    assert ledger.of_kind("kv", "host") > 0
    assert ledger.of_kind("kv") == 0
    wb.drop("kept on the host")
    assert answers(wb, graphs=False) == expected
    wb.policy = wb.policy.replace(kv={"place": "device", "graphs": True})


def test_the_graphs_have_rows_of_their_own(wb: lab.Workbench) -> None:
    answers(wb, graphs=True)
    rows = [row for row in wb.memory.rows if row.name.startswith("decode graphs")]
    assert {row.within for row in rows} == {"cache", "allocator", None}
    assert 0 < sum(row.nbytes or 0 for row in rows) < 512 * MiB
    wb.policy = wb.policy.replace(kv={"graphs": False})
    assert not any(row.name.startswith("decode graphs") for row in wb.memory.rows)
    wb.policy = wb.policy.replace(kv={"graphs": True})
