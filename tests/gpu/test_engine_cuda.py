"""The engine on a GPU: plain transformers' answers, memory that NVML sees come back, recovery under a cap."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import autoglm_lab as lab
from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.messages import read_messages
from autoglm_lab.engine.prompt import Prompt
from autoglm_lab.engine.step import Stepper
from autoglm_lab.units import GiB, MiB

QUESTIONS = ["Who are you?", "你是谁?", "Tap the red circle", "How many circles are there?"]


@pytest.fixture(scope="module")
def wb() -> Iterator[lab.Workbench]:
    with lab.load("autoglm-tiny", device="cuda", dtype="float32") as workbench:
        yield workbench


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8))


def generate(wb: lab.Workbench, messages: list[dict[str, Any]]) -> str:
    batch = wb.processor.apply_chat_template(
        [message.for_processor() for message in read_messages(messages)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to("cuda")
    ids = wb.model.generate(**batch, do_sample=False, max_new_tokens=64)
    return wb.processor.split_answer(wb.processor.decode(ids[0, batch["input_ids"].shape[1] :]))[1]


def test_answers_equal_plain_generate_alone_and_together(wb: lab.Workbench, picture: Image.Image) -> None:
    expected = []
    for question in QUESTIONS:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        expected.append(generate(wb, [{"role": "user", "content": content}]))
    alone = [wb.chat(text, image=picture, conversation=f"alone {text}", max_new_tokens=64) for text in QUESTIONS]
    assert [turn.result(120).text for turn in alone] == expected


def test_live_sound_equals_the_clip(wb: lab.Workbench) -> None:
    sound = (np.random.default_rng(1).normal(size=20_000) * 0.1).astype(np.float32)
    whole = wb.chat("Dial it", audio=sound, conversation="clip").result(60)
    turn = wb.chat(live=True, conversation="live")
    for packet in np.split(sound, [1, 700, 5000, 13_000]):
        turn.feed(packet)
    assert turn.ask("Dial it").result(60).text == whole.text


def test_a_parked_module_wakes_for_a_request_and_answers_the_same(wb: lab.Workbench, picture: Image.Image) -> None:
    kept = wb.chat("Tap the red circle", image=picture, conversation="kept").result(60).text
    for place in ("host", "disk"):
        wb.modules["vision"].park(place).result(60)
        assert wb.modules["vision"].info.place == place
        assert wb.chat("Tap the red circle", image=picture, conversation=f"from {place}").result(60).text == kept


def test_pages_of_forgotten_conversations_go_back_to_the_device(wb: lab.Workbench) -> None:
    wb.policy = wb.policy.replace(kv={"prefix_bytes": 0, "prefix_host_bytes": 0})
    for info in wb.conversations:
        wb.drop(info.name)
    wb.reclaim()
    before = wb.memory
    for number in range(4):
        wb.chat(f"{number}: " + "Who are you? " * 60, conversation=f"long {number}", max_new_tokens=4).result(60)
    held = wb.memory
    # What stood before holds the unused part of a chunk, from which pages are taken first.
    assert held.of_kind("kv") >= sum(info.kv_bytes for info in wb.conversations) > 0
    assert held.of_kind("kv") > before.of_kind("kv")
    for info in wb.conversations:
        wb.drop(info.name)
    wb.reclaim()
    assert wb.memory.of_kind("kv") == before.of_kind("kv")


def test_each_answer_tells_the_peaks_of_its_phases(wb: lab.Workbench, picture: Image.Image) -> None:
    unseen = picture.rotate(90)  # an image that was encoded before is not encoded again
    answer = wb.chat("Tap the red circle", image=unseen, conversation="peaks").result(60)
    assert {"encode", "prefill", "decode"} <= set(answer.peak_bytes)
    assert all(nbytes > 100 * MiB for nbytes in answer.peak_bytes.values())


@pytest.fixture(scope="module")
def phone() -> Iterator[lab.Workbench]:
    """The public phone model's shapes with made-up weights, 20.6 GB."""
    with lab.load("autoglm-phone-9b", weights="dummy", device="cuda") as workbench:
        yield workbench


def test_the_phone_model_s_vision_comes_and_goes(phone: lab.Workbench) -> None:
    phone.reclaim()  # the engine's thread has warmed up then
    ledger = phone.memory
    assert sum(row.nbytes or 0 for row in ledger.on("device")) == ledger.total
    assert abs(ledger.nbytes("vision") - 1_784_996_864) < 4 * MiB
    parked = phone.modules["vision"].park().result(60)
    freed = ledger.process - phone.memory.process
    woken = phone.modules["vision"].wake().result(60)
    again = phone.modules["vision"].park().result(60)
    logging.getLogger(__name__).info("%s\n%s\n%s\n%s\nfreed %s bytes", ledger, parked, woken, again, f"{freed:,}")
    assert freed >= 1_784_996_864
    assert phone.memory.nbytes("vision", "host") >= 1_784_996_864


def test_the_phone_model_decodes_a_batch_as_single_runs(phone: lab.Workbench) -> None:
    stepper, pool = Stepper(phone.model), phone.engine.state.pool
    assert pool is not None
    generator = torch.Generator().manual_seed(0)
    states = []
    for length in (40, 200):
        ids = torch.randint(0, 150_000, (length,), generator=generator).tolist()
        state = KvState(pool)
        logits = stepper.prefill(state, Prompt(tuple(ids), None, ()), 0)
        assert torch.isfinite(logits).all()
        states.append(state)
    assert all(torch.isfinite(logits).all() for logits in stepper.decode(states, [5, 6]))
    assert sum(state.nbytes for state in states) == (3 + 13) * 16 * 40_960
    for state in states:
        state.clear()
    pool.trim()


def test_a_budget_below_the_weights_is_refused_with_what_would_help() -> None:
    with pytest.raises(lab.OutOfMemoryError, match="out of memory in load: needed"):
        lab.load("autoglm-phone-9b", weights="dummy", device="cuda", policy=lab.MemoryPolicy(budget=16 * GiB))
