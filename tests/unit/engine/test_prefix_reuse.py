"""What one conversation leaves serves the next: prefixes kept after it, images encoded once; answers are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import autoglm_lab as lab
from autoglm_lab.engine.protocol import MemoryEvent
from autoglm_lab.memory.kv.host_pages import HostPages
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS
from autoglm_lab.memory.kv.prefix_store import PrefixStore

SYSTEM = "You look at screens and answer briefly, as a careful person would do it. " * 6


def screen(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (224, 224, 3), dtype=np.uint8))


def said(role: str, text: str, *images: Any) -> dict[str, Any]:
    parts = [*({"type": "image", "image": one} for one in images), {"type": "text", "text": text}]
    return {"role": role, "content": parts}


def ask(wb: lab.Workbench, name: str, *messages: dict[str, Any]) -> Any:
    """The answer to a whole dialogue."""
    return wb.engine.submit(messages, conversation=name, replace=True, max_new_tokens=24).result(60)


def anew(wb: lab.Workbench, *messages: dict[str, Any]) -> str:
    """The answer without anything kept."""
    policy = wb.policy
    wb.policy = policy.replace(kv={"reuse": False, "encoder_bytes": 0})
    text: str = ask(wb, "anew", *messages).text
    wb.drop("anew")
    wb.policy = policy
    return text


def kv_rows_add_up(wb: lab.Workbench) -> bool:
    pool = wb.engine.state.pool
    assert pool is not None
    rows = [row for row in wb.memory.on("device") if row.kind == "kv"]
    names = [row.name for row in rows]
    assert len(names) == len(set(names))
    return sum(row.nbytes or 0 for row in rows) == pool.backed


def test_the_prefix_of_a_dropped_conversation_is_reused(wb: lab.Workbench) -> None:
    dialogue = said("system", SYSTEM), said("user", "Who are you?")
    first = ask(wb, "first", *dialogue)
    wb.drop("first")
    kept = wb.memory.nbytes("KV kept prefixes")
    assert kept > 0
    assert kv_rows_add_up(wb)
    second = ask(wb, "second", *dialogue)
    assert second.text == first.text
    assert second.usage.cached_tokens > 64
    assert wb.memory.nbytes("KV kept prefixes") < kept
    assert kv_rows_add_up(wb)


def test_an_image_stripped_from_the_history_leaves_what_was_before_it(wb: lab.Workbench) -> None:
    first = said("system", SYSTEM), said("user", "Tap the red circle", screen(1))
    one = ask(wb, "phone", *first)
    stripped = [first[0], said("user", "Tap the red circle"), said("assistant", one.text)]
    two = ask(wb, "phone", *stripped, said("user", "And now?", screen(2)))
    assert two.usage.cached_tokens > 64
    again = ask(wb, "other", *first)  # the dialogue before it was edited
    assert again.text == one.text
    assert again.usage.cached_tokens > 64
    assert two.text == anew(wb, *stripped, said("user", "And now?", screen(2)))
    assert one.text == anew(wb, *first)


def test_branches_of_a_dialogue_hold_their_common_part_once(wb: lab.Workbench) -> None:
    common = said("system", SYSTEM), said("user", "Who are you?"), said("assistant", "A phone agent. " * 8)
    expected = {text: anew(wb, *common, said("user", text)) for text in ("And then?", "Why?", "Stop.")}
    for _ in range(2):
        for text, answer in expected.items():
            assert ask(wb, text, *common, said("user", text)).text == answer
    held = [wb.engine.state.conversations.get(text).kv.paged.pages for text in expected]
    shared = len(set(held[0]) & set(held[1]) & set(held[2]))
    assert shared * PAGE_TOKENS > 96
    assert kv_rows_add_up(wb)


def test_eight_conversations_in_turn_each_find_their_own_again(wb: lab.Workbench) -> None:
    wb.policy = wb.policy.replace(kv={"max_conversations": 2})
    dialogues = {f"c{number}": [said("system", f"{number}. {SYSTEM}")] for number in range(8)}
    for step in range(3):
        for name, dialogue in dialogues.items():
            dialogue.append(said("user", f"Step {step}?"))
            before = wb.engine.state.conversations.get(name).info().tokens
            answer = ask(wb, name, *dialogue)
            assert before == 0  # evicted meanwhile
            if step:
                assert answer.usage.cached_tokens > 0.6 * answer.usage.prompt_tokens
            dialogue.append(said("assistant", answer.text))
    assert answer.text == anew(wb, *dialogue[:-1])


def test_the_budget_of_kept_prefixes_holds_at_once(wb: lab.Workbench) -> None:
    for number in range(4):
        ask(wb, f"c{number}", said("system", f"{number}. {SYSTEM}"), said("user", "Who are you?"))
        wb.drop(f"c{number}")
    page = wb.engine.state.pool.page_bytes
    assert wb.memory.nbytes("KV kept prefixes") > 12 * page
    wb.policy = wb.policy.replace(kv={"prefix_bytes": 5 * page})
    assert wb.memory.nbytes("KV kept prefixes") == 5 * page
    ask(wb, "more", said("system", SYSTEM), said("user", "Who are you?"))
    wb.drop("more")
    assert wb.memory.nbytes("KV kept prefixes") == 5 * page
    wb.policy = wb.policy.replace(kv={"reuse": False})
    assert wb.memory.of_kind("kv") == 0


def test_prefixes_that_went_to_the_host_answer_the_same(wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = wb.engine.state.pool
    store = PrefixStore(pool, HostPages(pool.form.nbytes, torch.device("cpu")), PAGE_TOKENS)
    monkeypatch.setattr(pool, "prefixes", store)
    wb.policy = wb.policy.replace(kv={"prefix_bytes": 2 * pool.page_bytes})
    dialogue = said("system", SYSTEM), said("user", "Tap the red circle", screen(1))
    first = ask(wb, "first", *dialogue)
    wb.drop("first")
    assert wb.memory.nbytes("KV kept prefixes") == 2 * pool.page_bytes
    assert wb.memory.nbytes("KV kept prefixes", "host") > 0
    second = ask(wb, "second", *dialogue)
    assert second.text == first.text
    assert second.usage.cached_tokens > 64
    assert store.host.copied_in > 0
    wb.drop("second")
    wb.policy = wb.policy.replace(kv={"reuse": False})
    assert (store.host_nbytes, pool.used_pages) == (0, 0)


def test_two_conversations_with_images_do_not_disturb_each_other(wb: lab.Workbench) -> None:
    dialogues = {name: [said("system", SYSTEM)] for name in ("a", "b")}
    for step in range(3):
        for seed, (name, dialogue) in enumerate(dialogues.items()):
            dialogue.append(said("user", "Tap the red circle", screen(10 * seed + step)))
            answer = ask(wb, name, *dialogue)
            dialogue.append(said("assistant", answer.text))
    for dialogue in dialogues.values():
        assert anew(wb, *dialogue[:-1]) == dialogue[-1]["content"][0]["text"]


def test_a_picture_seen_before_needs_no_encoder(wb: lab.Workbench) -> None:
    wb.policy = wb.policy.replace(modules={"vision": "on-demand"})
    first = wb.chat("Tap the red circle", image=screen(1), conversation="one").result(60)
    features = wb.engine.state.features
    assert wb.memory.nbytes("encoder outputs") == features.nbytes > 0
    wb.modules["vision"].park()
    turn = wb.chat("Tap the red circle", image=screen(1), conversation="two")
    assert turn.result(60).text == first.text
    assert not [event for event in turn if isinstance(event, MemoryEvent)]
    assert wb.modules["vision"].info.place == "disk"
    wb.policy = wb.policy.replace(kv={"encoder_bytes": 0})
    assert wb.memory.nbytes("encoder outputs") == 0


def test_a_sound_heard_before_needs_no_encoder_and_leaves_images_apart(wb: lab.Workbench, sound: Any) -> None:
    wb.policy = wb.policy.replace(modules={"audio": "on-demand", "vision": "on-demand"})
    first = wb.chat("Dial it", audio=sound, image=screen(1), conversation="one").result(60)
    for name in ("audio", "vision"):
        wb.modules[name].park()
    second = wb.chat("Dial it", audio=sound, image=screen(1), conversation="two").result(60)
    assert second.text == first.text
    assert {wb.modules[name].info.place for name in ("audio", "vision")} == {"disk"}


def test_outputs_of_weights_that_were_changed_are_forgotten(wb: lab.Workbench) -> None:
    weight = next(wb.model.model.vision_tower.parameters())
    before = wb.chat("Tap the red circle", image=screen(1), conversation="one").result(60)
    features = wb.engine.state.features
    assert len(features) == 1
    hits = features.hits
    old = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    wb.chat("Tap the red circle", image=screen(1), conversation="two").result(60)
    assert features.hits == hits
    with torch.no_grad():
        weight.copy_(old)
    wb.policy = wb.policy.replace(kv={"reuse": False})
    assert wb.chat("Tap the red circle", image=screen(1), conversation="three").result(60).text == before.text


def test_memory_that_runs_out_takes_what_is_only_kept(wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(wb, "gone", said("system", SYSTEM), said("user", "Tap", screen(1)))
    wb.drop("gone")
    failures = iter([torch.OutOfMemoryError("no room")])
    forward = wb.model.forward

    def sometimes(*arguments: Any, **names: Any) -> Any:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        return forward(*arguments, **names)

    monkeypatch.setattr(wb.model, "forward", sometimes)
    assert wb.chat("Who are you?", max_new_tokens=4).result(60).text
    assert wb.memory.nbytes("KV kept prefixes") == 0
    assert wb.memory.nbytes("encoder outputs") == 0
