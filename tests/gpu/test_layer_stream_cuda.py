"""Parts of the layers on the host: the same answers from fewer bytes of the GPU."""

from __future__ import annotations

import pytest

import autoglm_lab as lab
from autoglm_lab.errors import PolicyError
from autoglm_lab.models.placement import host_share, stage_bytes
from autoglm_lab.units import KiB, MiB

QUESTIONS = ["Who are you?", "你是谁?", "Tap the red circle"]


def answers(policy: lab.MemoryPolicy) -> tuple[list[str], int, int]:
    """Answers one by one and together, and the bytes of weights on the device and on the host."""
    with lab.load("autoglm-tiny", device="cuda", dtype="float32", policy=policy) as wb:
        alone = [wb.chat(text, conversation="alone " + text, max_new_tokens=32).result(120).text for text in QUESTIONS]
        turns = [wb.chat(text, conversation=text, max_new_tokens=32) for text in QUESTIONS]
        together = [turn.result(120).text for turn in turns]
        ledger = wb.memory
        return [*alone, *together], ledger.of_kind("weights"), ledger.of_kind("weights", "host")


@pytest.mark.parametrize("graphs", [True, False])
def test_answers_are_the_same_with_fewer_bytes_on_the_gpu(graphs: bool) -> None:
    policy = lab.MemoryPolicy(kv={"graphs": graphs})
    expected, whole, _ = answers(policy)
    saved = 6 * MiB
    texts, held, on_host = answers(policy.replace(placement={"host_bytes": saved}))
    assert texts == expected
    assert whole - held >= saved - 4 * MiB  # slabs and stages are whole chunks of 2 MiB each
    assert on_host >= saved


def test_a_captured_step_brings_the_layers_itself() -> None:
    with lab.load("autoglm-tiny", device="cuda", policy=lab.MemoryPolicy(placement={"host_bytes": 6 * MiB})) as wb:
        wb.chat("Who are you?").result(120)
        notes = [event.why for event in wb.events if event.subject == "decode graphs"]
        assert any("captured" in note for note in notes)
        assert not any("cannot be captured" in note for note in notes)
        parts = host_share(wb.outline().model, 6 * MiB).parts
        rows = {row.name: row.nbytes for row in wb.memory.rows if row.name == "text stages"}
        assert stage_bytes(parts) <= rows["text stages"] <= stage_bytes(parts) + 2 * MiB + 16 * KiB
        with pytest.raises(PolicyError, match="since this model was loaded"):
            wb.policy = wb.policy.replace(placement={"host_bytes": 0})
