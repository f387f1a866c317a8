"""Eviction on a GPU: within the limit, by captured steps as by others, and beside conversations that are not cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import autoglm_lab as lab

SMALL_TALK = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am AutoGLM-Tiny."}]
DIALOGUE = [
    *SMALL_TALK * 3,
    {"role": "user", "content": "Remember that the code of the safe is 5038"},
    {"role": "assistant", "content": "OK, noted."},
    *SMALL_TALK * 12,
    {"role": "user", "content": "What is the code of the safe?"},
]
LIMIT = {"max_tokens": 128, "sinks": 16, "overflow": "evict"}


@pytest.fixture(scope="module")
def wb() -> Iterator[lab.Workbench]:
    with lab.load("autoglm-tiny", device="cuda", dtype="float32") as workbench:
        yield workbench


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_captured_steps_answer_as_others_do_within_the_limit(wb: lab.Workbench, precision: str, place: str) -> None:
    texts = []
    for graphs in (False, True):
        kv = LIMIT | {"precision": precision, "place": place, "graphs": graphs}
        wb.policy = lab.MemoryPolicy(kv=kv)
        page = wb.engine.state.pool.page_bytes
        turn = wb.engine.submit(DIALOGUE, conversation="evicted", replace=True, min_new_tokens=60, max_new_tokens=60)
        answer = turn.result(120)
        assert answer.usage.prompt_tokens > 128
        assert answer.kv_bytes <= 8 * page
        assert wb.engine.state.conversations.get("evicted").kv.held <= 128
        texts.append(answer.text)
        wb.drop("evicted")
    assert texts[0] == texts[1]


def test_a_needle_is_found_while_another_conversation_answers(wb: lab.Workbench) -> None:
    wb.policy = lab.MemoryPolicy(kv=LIMIT)
    turns = [wb.engine.submit(DIALOGUE, conversation=f"needle {number}", replace=True) for number in range(4)]
    other = wb.chat("Who are you?", conversation="short")
    assert all("5038" in turn.result(120).text for turn in turns)
    assert other.result(120).text.startswith("I am AutoGLM-Tiny")
