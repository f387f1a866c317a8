"""The local engine: answers equal plain transformers', conversations apart, Stop, live sound, limits, switches."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.engine.messages import read_messages
from autoglm_lab.engine.protocol import Answer, MemoryEvent, TextDelta
from autoglm_lab.errors import (
    ContextLimitError,
    ConversationError,
    EngineClosedError,
    MessageError,
    ModuleError,
    ModuleOffError,
    PolicyError,
)


def generate(wb: lab.Workbench, messages: list[dict[str, Any]], **settings: Any) -> str:
    """The answer of plain transformers."""
    thinking = settings.pop("thinking", False)
    batch = wb.processor.apply_chat_template(
        [message.for_processor() for message in read_messages(messages)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    ids = wb.model.generate(**batch, do_sample=False, max_new_tokens=64, **settings)
    return wb.processor.split_answer(wb.processor.decode(ids[0, batch["input_ids"].shape[1] :]))[1]


def user(text: str, **media: Any) -> dict[str, Any]:
    parts = [{"type": kind, kind: value} for kind, value in media.items()]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_every_modality_answers_as_plain_generate(wb: lab.Workbench, picture: Any, sound: Any) -> None:
    for number, message in enumerate(
        [user("你是谁?"), user("Tap the red circle", image=picture), user("Dial it", audio=sound)]
    ):
        turn = wb.engine.submit([message], conversation=f"c{number}", max_new_tokens=64)
        assert turn.result(60).text == generate(wb, [message])


def test_later_turns_reuse_the_earlier_and_answer_the_same(wb: lab.Workbench, picture: Any) -> None:
    history: list[dict[str, Any]] = []
    for text, media in [("Who are you?", {}), ("Tap the red circle", {"image": picture}), ("How many icons?", {})]:
        history.append(user(text, **media))
        answer = wb.chat(text, **media, max_new_tokens=64).result(60)
        assert answer.text == generate(wb, history)
        history.append({"role": "assistant", "content": answer.text})
    assert answer.usage.cached_tokens > answer.usage.prompt_tokens // 2
    (info,) = wb.conversations
    assert info.turns == 3
    assert info.kv_bytes > 0
    assert info.reused_share is not None
    assert info.reused_share > 0.5


def test_without_reuse_the_answers_are_the_same(wb: lab.Workbench, picture: Any) -> None:
    def dialogue(name: str) -> list[str]:
        return [
            wb.chat("Tap the red circle", image=picture, conversation=name).result(60).text,
            wb.chat("And the blue one?", conversation=name).result(60).text,
        ]

    reused = dialogue("reused")
    wb.policy = wb.policy.replace(kv={"reuse": False})
    assert dialogue("anew") == reused


def test_conversations_side_by_side_do_not_disturb_each_other(wb: lab.Workbench, picture: Any) -> None:
    questions = ["Who are you?", "你是谁?", "Tap the red circle", "How many circles?"]
    alone = [wb.chat(text, image=picture, conversation=f"alone {text}").result(60).text for text in questions]
    turns = [wb.chat(text, image=picture, conversation=f"together {text}") for text in questions]
    assert [turn.result(60).text for turn in turns] == alone


def test_a_system_prompt_is_read_and_stored_once_for_all_conversations(wb: lab.Workbench, picture: Any) -> None:
    system = "You look at screens and answer briefly, as a careful person would do it. " * 4
    answers = []
    for name in ("one", "two"):
        turn = wb.chat("Tap the red circle", system=system, image=picture, conversation=name)
        answers.append(turn.result(60))
    assert answers[0].text == answers[1].text
    assert answers[0].usage.cached_tokens == 0
    assert answers[1].usage.cached_tokens > 64
    shared = wb.memory.nbytes("KV shared prefixes")
    assert shared > 0
    rows = wb.memory.of_kind("kv")
    assert rows < sum(info.kv_bytes for info in wb.conversations)
    wb.drop("one")
    assert wb.memory.nbytes("KV shared prefixes") == 0
    follow_up = wb.chat("And the blue one?", conversation="two").result(60)
    assert follow_up.usage.cached_tokens > 64


def test_two_turns_of_one_conversation_wait_for_each_other(wb: lab.Workbench) -> None:
    first, second = wb.chat("Who are you?"), wb.chat("And what can you do?")
    assert first.result(60).usage.prompt_tokens < second.result(60).usage.cached_tokens + 16
    assert wb.conversations[0].turns == 2


def test_events_come_in_order_and_end_with_the_answer(wb: lab.Workbench) -> None:
    turn = wb.chat("Who are you?", conversation="events")
    events = list(turn)
    assert isinstance(events[-1], Answer)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == events[-1].text == turn.text
    assert events[-1].timings.first_token is not None
    assert events[-1].usage.completion_tokens > 0
    assert list(turn) == events


def test_a_turn_can_be_awaited_and_iterated_in_a_loop(wb: lab.Workbench) -> None:
    async def talk() -> tuple[Answer, list[Any]]:
        turn = wb.chat("Who are you?")
        seen = [event async for event in turn]
        return await turn, seen

    answer, seen = asyncio.run(talk())
    assert seen[-1] is answer


def test_stop_ends_the_answer_and_keeps_what_was_said(wb: lab.Workbench) -> None:
    turn = wb.chat("Who are you?", max_new_tokens=4000, min_new_tokens=3000)
    while not turn.text:
        time.sleep(0.01)
    turn.cancel()
    answer = turn.result(30)
    assert answer.finish_reason == "cancelled"
    assert answer.text == turn.text
    assert wb.chat("Who are you?", conversation="after").result(30).finish_reason == "stop"


def test_stop_ends_every_turn_under_way(wb: lab.Workbench) -> None:
    turns = [
        wb.chat("Who are you?", conversation=name, max_new_tokens=4000, min_new_tokens=3000) for name in ("a", "b", "a")
    ]
    while not all(turn.text for turn in turns[:2]):
        time.sleep(0.01)
    wb.stop()
    assert [turn.result(30).finish_reason for turn in turns] == ["cancelled"] * 3


def test_a_turn_cancelled_while_it_waits_never_runs(wb: lab.Workbench) -> None:
    first = wb.chat("Who are you?", max_new_tokens=2000, min_new_tokens=1500)
    second = wb.chat("Who are you?")
    second.cancel()
    assert second.result(30).usage.completion_tokens == 0
    first.cancel()
    first.result(30)
    assert wb.conversations[0].turns == 1


def test_live_sound_answers_as_the_whole_clip(wb: lab.Workbench, sound: Any) -> None:
    whole = wb.chat("Dial it", audio=sound, conversation="clip").result(60)
    turn = wb.chat(live=True, conversation="live")
    for packet in np.split(sound, [1, 700, 5000, 5001, 13_000]):
        turn.feed(packet)
    answer = turn.ask("Dial it").result(60)
    assert answer.text == whole.text
    assert answer.usage.audio_tokens == whole.usage.audio_tokens
    with pytest.raises(ConversationError, match="takes no live sound"):
        turn.feed(sound)
    follow_up = [wb.chat("Again?", conversation=name).result(60).text for name in ("clip", "live")]
    assert follow_up[0] == follow_up[1]


def test_a_live_turn_can_be_cancelled_before_it_is_asked(wb: lab.Workbench, sound: Any) -> None:
    turn = wb.chat(live=True)
    turn.feed(sound)
    turn.cancel()
    assert turn.result(30).finish_reason == "cancelled"


def test_a_request_for_a_module_that_is_off_names_the_setting(wb: lab.Workbench, picture: Any) -> None:
    wb.policy = wb.policy.replace(modules={"vision": "off"})
    assert wb.modules["vision"].info.place == "disk"
    with pytest.raises(ModuleOffError, match=r"needs the module 'vision' .* set modules\.vision\.residency to 'keep'"):
        wb.chat("Tap the red circle", image=picture)
    assert wb.chat("Who are you?").result(60).finish_reason == "stop"


def test_on_demand_wakes_for_a_request_parks_when_idle_and_answers_the_same(wb: lab.Workbench, picture: Any) -> None:
    kept = wb.chat("Tap the red circle", image=picture, conversation="kept").result(60)
    wb.policy = wb.policy.replace(
        modules={"vision": {"residency": "on-demand", "keep_alive": 0.3}}, kv={"encoder_bytes": 0}
    )
    wb.modules["vision"].park()
    turn = wb.chat("Tap the red circle", image=picture, conversation="on demand")
    assert turn.result(60).text == kept.text
    assert [event.event.kind for event in turn if isinstance(event, MemoryEvent)] == ["woke"]
    deadline = time.monotonic() + 10
    while wb.modules["vision"].info.place != "disk" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert wb.modules["vision"].info.place == "disk"
    assert any(event.kind == "parked" and "idle for 0.3 s" in event.why for event in wb.events)


def test_a_follow_up_on_a_reused_picture_leaves_vision_parked(wb: lab.Workbench, picture: Any) -> None:
    wb.policy = wb.policy.replace(modules={"vision": "on-demand"})
    wb.chat("Tap the red circle", image=picture).result(60)
    wb.modules["vision"].park()
    wb.chat("And the blue one?").result(60)
    assert wb.modules["vision"].info.place == "disk"


def test_stop_ends_the_answer_at_the_kv_limit_and_then_says_so(wb: lab.Workbench) -> None:
    wb.policy = wb.policy.replace(kv={"max_tokens": 48}, generation={"min_new_tokens": 100})
    answer = wb.chat("Who are you?").result(60)
    assert answer.finish_reason == "length"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 48
    with pytest.raises(ContextLimitError, match=r"kv\.max_tokens allows 48 together: start a new conversation"):
        wb.chat("And now?").result(60)


def test_dropping_the_oldest_turns_keeps_the_kv_limit(wb: lab.Workbench) -> None:
    wb.policy = wb.policy.replace(
        kv={"max_tokens": 120, "overflow": "drop-oldest-turns"}, generation={"max_new_tokens": 20}
    )
    for number in range(8):
        wb.chat(f"Who are you? I am number {number}.", system="Be brief." if number == 0 else None).result(60)
        assert wb.conversations[0].tokens <= 120
    messages = wb.engine.state.conversations.get("main").messages
    assert messages[0].role == "system"
    assert messages[-2].text == "Who are you? I am number 7."
    assert any(event.kind == "dropped" for event in wb.events)


def test_after_dropping_turns_the_answer_is_as_if_they_never_were(wb: lab.Workbench) -> None:
    for number in range(4):
        wb.chat(f"Who are you? I am number {number}.", conversation="long").result(60)
    kept = len(wb.engine.state.conversations.get("long").kv.ids)
    wb.policy = wb.policy.replace(kv={"max_tokens": kept, "overflow": "drop-oldest-turns"})
    answer = wb.chat("What can you do?", conversation="long", max_new_tokens=kept // 4).result(60)
    messages = wb.engine.state.conversations.get("long").messages[:-1]
    assert sum(message.role == "user" for message in messages) < 5
    wb.policy = lab.MemoryPolicy()
    raw = [{"role": message.role, "content": message.text} for message in messages]
    fresh = wb.engine.submit(raw, conversation="never had them", max_new_tokens=kept // 4).result(60)
    assert fresh.text == answer.text


def test_refuse_says_no_before_the_prompt_is_read(wb: lab.Workbench) -> None:
    wb.policy = wb.policy.replace(kv={"max_tokens": 64, "overflow": "refuse"})
    with pytest.raises(ContextLimitError, match=r"the answer may have 256, but kv\.max_tokens allows 64 together"):
        wb.chat("Who are you?").result(60)
    assert wb.chat("Who are you?", max_new_tokens=40).result(60).text


def test_a_failed_turn_leaves_the_conversation_as_it_was(wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = wb.chat("Who are you?").result(60)
    before = wb.engine.state.conversations.get("main").messages
    layer = wb.model.model.language_model.layers[3]

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken in the middle of the layers")

    monkeypatch.setattr(layer, "forward", fails)
    with pytest.raises(RuntimeError, match="broken in the middle"):
        wb.chat("And now?").result(60)
    monkeypatch.undo()
    assert wb.engine.state.conversations.get("main").messages == before
    wb.drop("main")
    assert wb.chat("Who are you?").result(60).text == first.text


def test_out_of_memory_is_an_answer(wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    wb.chat("Who are you?", conversation="idle").result(60)
    full = torch.OutOfMemoryError("no room")
    failures = iter([full, None, full, full])
    forward = wb.model.forward

    def sometimes(*arguments: Any, **names: Any) -> Any:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        return forward(*arguments, **names)

    monkeypatch.setattr(wb.model, "forward", sometimes)
    answered = wb.chat("Who are you?", max_new_tokens=1).result(60)
    assert answered.usage.completion_tokens == 1
    kinds = [event.kind for event in wb.events]
    assert "out of memory" in kinds
    assert "evicted" in kinds
    with pytest.raises(lab.OutOfMemoryError, match=r"out of memory in prefill: needed .* What would help: "):
        wb.chat("Who are you?", conversation="other").result(60)
    monkeypatch.undo()
    assert wb.chat("Who are you?", conversation="idle").result(60).finish_reason == "stop"


def test_sampling_follows_the_policy_and_its_seed(wb: lab.Workbench) -> None:
    settings = {"temperature": 2.0, "seed": 7, "max_new_tokens": 24, "min_new_tokens": 24}
    one, two, other = (
        wb.chat("Tell me something", conversation=name, **{**settings, "seed": seed}).result(60)
        for name, seed in [("a", 7), ("b", 7), ("c", 8)]
    )
    assert one.text == two.text != other.text
    assert one.usage.completion_tokens == 24


def test_settings_that_cannot_be_are_refused_by_name(wb: lab.Workbench) -> None:
    with pytest.raises(PolicyError, match=r"no setting 'generation\.top_k'; valid settings are max_new_tokens"):
        wb.chat("hello", top_k=3)
    with pytest.raises(PolicyError, match="this model has no module 'visoin'; its modules are vision, audio"):
        wb.policy = wb.policy.replace(modules={"visoin": "off"})
    with pytest.raises(ModuleError, match="this model has no module 'eyes'"):
        wb.modules["eyes"].park()
    with pytest.raises(MessageError, match="there are no messages"):
        wb.engine.submit([])
    with pytest.raises(ConversationError, match="there is no conversation 'nobody'"):
        wb.drop("nobody")


def test_commands_from_many_threads_while_turns_run(wb: lab.Workbench, picture: Any) -> None:
    wb.policy = wb.policy.replace(modules={"vision": "on-demand", "audio": "on-demand"})
    expected = wb.chat("Tap the red circle", image=picture, conversation="expected").result(60).text
    errors: list[BaseException] = []

    def flip(name: str) -> None:
        try:
            for _ in range(10):
                wb.modules[name].park()
                wb.modules[name].wake()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=flip, args=(name,)) for name in ("vision", "vision", "audio")]
    for thread in threads:
        thread.start()
    turns = [wb.chat("Tap the red circle", image=picture, conversation=f"t{number}") for number in range(6)]
    answers = [turn.result(120).text for turn in turns]
    for thread in threads:
        thread.join()
    assert not errors
    assert answers == [expected] * 6


def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    workbench = lab.load("autoglm-tiny", device="cpu")
    turn = workbench.chat("Who are you?", max_new_tokens=4000, min_new_tokens=3500)
    workbench.close()
    assert turn.result(30).finish_reason == "cancelled"
    with pytest.raises(EngineClosedError, match="was closed: load the model again"):
        workbench.chat("hello")
    workbench.close()
    assert repr(workbench) == "autoglm-tiny (closed)"


def test_whoever_asks_while_it_closes_gets_an_answer_or_an_error() -> None:
    workbench = lab.load("autoglm-tiny", device="cpu")
    outcomes: list[str] = []

    def ask() -> None:
        try:
            while True:
                workbench.reclaim()
        except EngineClosedError:
            outcomes.append("closed")

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    workbench.close()
    for thread in threads:
        thread.join(timeout=20)
    assert outcomes == ["closed"] * 8


def test_a_workbench_that_nobody_holds_goes_away() -> None:
    workbench = lab.load("autoglm-tiny", device="cpu")
    workbench.chat("Who are you?").result(60)
    engine = weakref.ref(workbench.engine)
    del workbench
    deadline = time.monotonic() + 10
    while engine() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.1)
    assert engine() is None


def test_an_answer_says_what_each_phase_took_above_its_start(wb: lab.Workbench) -> None:
    answer = wb.chat("你是谁?").result(60)
    assert {"prefill", "decode"} <= set(answer.work_bytes) == set(answer.peak_bytes)
    assert all(0 <= answer.work_bytes[phase] < nbytes for phase, nbytes in answer.peak_bytes.items())
