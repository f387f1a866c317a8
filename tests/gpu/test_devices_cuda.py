"""One model on two GPUs."""

from __future__ import annotations

import pytest
import torch

import autoglm_lab as lab

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices here")
TWO = ["cuda:0", "cuda:1"]


@pytest.fixture(scope="module")
def answers() -> list[str]:
    with lab.load("autoglm-tiny", dtype="float32", device="cuda:0") as one:
        return [one.chat(text).result().text for text in ("你是谁?", "What can you do?")]


def test_it_answers_as_one_gpu_does(answers: list[str]) -> None:
    with lab.load("autoglm-tiny", dtype="float32", devices=TWO) as two:
        assert [two.chat(text).result().text for text in ("你是谁?", "What can you do?")] == answers


def test_a_part_is_parked_off_its_own_gpu_and_woken() -> None:
    with lab.load("autoglm-tiny", dtype="float32", devices=TWO) as two:
        two.chat("Hello", conversation="a").result()
        two.drop("a")
        before = two.ledgers()[1].nbytes("text@1")
        two.modules["text@1"].park().result()
        assert before > 0 == two.ledgers()[1].nbytes("text@1")
        assert two.chat("Hello", conversation="b").result().text
        assert two.ledgers()[1].nbytes("text@1") == before


def test_both_ledgers_close() -> None:
    with lab.load("autoglm-tiny", dtype="float32", devices=2) as two:
        two.chat("Hello").result()
        for ledger in two.ledgers():
            assert ledger.process is None or abs(ledger.unattributed) <= 0.01 * ledger.process


def test_a_budget_holds_on_each() -> None:
    with lab.load("autoglm-tiny", dtype="float32", devices=TWO) as two:
        two.policy = two.policy.replace(budget="4GiB")
        assert two.chat("Hello").result().text
        for ledger in two.ledgers():
            assert ledger.budget == 4 << 30
            assert ledger.process is None or ledger.process <= 4 << 30


def test_a_device_map_of_accelerates_is_respected(answers: list[str]) -> None:
    given = {"": 0, "model.language_model.layers.2": 1}
    with lab.load("autoglm-tiny", dtype="float32", devices=given) as two:
        assert two.modules["text@1"].info.nbytes <= two.ledgers()[1].of_kind("weights")
        assert two.chat("你是谁?").result().text == answers[0]
