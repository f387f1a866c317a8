"""A client without state sends its whole dialogue each time: the engine keeps what begins alike."""

from __future__ import annotations

from typing import Any

import pytest

import autoglm_lab as lab
from autoglm_lab.engine.messages import read_messages
from autoglm_lab.errors import ContextLimitError


def said(role: str, text: str, *images: Any) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": "image", "image": one} for one in images), _text(text)]}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def stock(wb: lab.Workbench, messages: list[dict[str, Any]]) -> str:
    """The answer of plain transformers."""
    batch = wb.processor.apply_chat_template(
        [message.for_processor() for message in read_messages(messages)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    ids = wb.model.generate(**batch, do_sample=False, max_new_tokens=32)  # type: ignore[operator]
    text: str = wb.processor.split_answer(wb.processor.decode(ids[0, batch["input_ids"].shape[1] :]))[1]
    return text


def test_a_dialogue_sent_whole_takes_the_place_of_what_was_said(wb: lab.Workbench, picture: Any) -> None:
    dialogue = [said("system", "You hold a phone. " * 20), said("user", "Tap the red circle", picture)]
    first = wb.engine.submit(dialogue, conversation="phone", replace=True, max_new_tokens=32).result(60)
    assert first.text == stock(wb, dialogue)
    stripped = [dialogue[0], said("user", "Tap the red circle"), said("assistant", first.text)]
    dialogue = [*stripped, said("user", "And now?", picture)]
    second = wb.engine.submit(dialogue, conversation="phone", replace=True, max_new_tokens=32).result(60)
    assert second.text == stock(wb, dialogue)
    assert second.usage.cached_tokens >= 40
    (info,) = wb.conversations
    assert info.turns == 2


def test_the_next_turn_goes_on_from_the_dialogue_that_was_sent(wb: lab.Workbench) -> None:
    wb.engine.submit([said("user", "Forget me")], conversation="a", max_new_tokens=8).result(60)
    sent = [said("user", "Who are you?"), said("assistant", "AutoGLM"), said("user", "What can you do?")]
    answer = wb.engine.submit(sent, conversation="a", replace=True, max_new_tokens=32).result(60)
    after = wb.engine.submit([said("user", "Thanks")], conversation="a", max_new_tokens=32).result(60)
    assert after.text == stock(wb, [*sent, said("assistant", answer.text), said("user", "Thanks")])


def test_a_dialogue_that_is_not_kept_leaves_only_what_the_next_one_begins_with(wb: lab.Workbench) -> None:
    dialogue = [said("system", "You hold a phone. " * 20), said("user", "Who are you?")]
    first = wb.engine.submit(dialogue, conversation="once", replace=True, keep=False, max_new_tokens=16).result(60)
    assert wb.conversations == ()
    pool, read = wb.engine.state.pool, first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert pool is not None and first.kv_bytes == -(-read // 16) * pool.page_bytes
    second = wb.engine.submit(dialogue, conversation="twice", replace=True, keep=False, max_new_tokens=16).result(60)
    assert second.text == first.text
    assert second.usage.cached_tokens >= 40


def test_a_dialogue_that_is_not_kept_goes_when_it_fails_or_is_cancelled(wb: lab.Workbench) -> None:
    wb.policy = wb.policy.replace(kv={"max_tokens": 16, "overflow": "refuse"})
    turn = wb.engine.submit([said("user", "Who are you?" * 30)], conversation="long", keep=False)
    with pytest.raises(ContextLimitError):
        turn.result(60)
    assert wb.conversations == ()
