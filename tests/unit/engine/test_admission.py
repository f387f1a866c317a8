"""What cannot fit is refused before it is tried, and says what would fit."""

from __future__ import annotations

from functools import partial

import pytest

import autoglm_lab as lab
from autoglm_lab.engine import admission as admission_file
from autoglm_lab.errors import AdmissionError, OutOfMemoryError
from autoglm_lab.memory.planning.plan_record import PlanRecord
from autoglm_lab.memory.planning.traced_model import TracedModel
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB, MiB

LONG = "open the clock and tell me what it says " * 40
"""Some 800 tokens for the embedded model."""


def learnt(wb: lab.Workbench, **question: object) -> None:
    """Let the plan of such a question be known: it is recorded beside the engine."""
    wb.chat(conversation="first", max_new_tokens=2, **question).result(120)
    wb.engine.state.admission.settle()
    wb.drop("first")


def short_of(wb: lab.Workbench, nbytes: int) -> None:
    """A budget that leaves so many bytes, with nothing kept between turns."""
    stores = {"prefix_bytes": 0, "encoder_bytes": 0}
    wb.policy = MemoryPolicy(budget=64 * GiB, kv=stores, reclaim={"every_answers": None})
    wb.reclaim()
    held = wb.engine.state.accelerator.reading().process
    wb.policy = wb.policy.replace(budget=held + nbytes)


@pytest.fixture
def near(wb: lab.Workbench) -> lab.Workbench:
    """The workbench with a budget, and what its questions need known."""
    wb.policy = MemoryPolicy(budget=64 * GiB, kv={"prefix_bytes": 0, "encoder_bytes": 0})
    learnt(wb, text=LONG)
    return wb


def test_a_turn_that_cannot_fit_is_refused_untried_and_says_what_would(near, monkeypatch):
    monkeypatch.setattr(admission_file, "DOUBT", 0.0)
    short_of(near, 1 * MiB)
    steps = []
    monkeypatch.setattr(near.engine.state.stepper, "prefill", lambda *_, **__: steps.append("prefill"))
    with pytest.raises(AdmissionError) as caught:
        near.chat(LONG, max_new_tokens=600).result(60)
    assert not steps
    error = caught.value
    assert error.needed > error.had and error.phase in ("prefill", "decode")
    told = str(error)
    assert told.startswith(f"refused before it was tried: {error.phase} needs ")
    assert told.endswith("force=True tries it all the same")
    assert "a budget of " in told
    assert isinstance(error, OutOfMemoryError)


def test_force_tries_it_all_the_same(near, monkeypatch):
    monkeypatch.setattr(admission_file, "DOUBT", 0.0)
    short_of(near, 1 * MiB)
    tried = []
    prefill = near.engine.state.stepper.prefill
    monkeypatch.setattr(
        near.engine.state.stepper, "prefill", lambda *given, **more: tried.append(1) or prefill(*given, **more)
    )
    turn = near.chat(LONG, max_new_tokens=600, force=True)
    try:
        turn.result(120)
    except AdmissionError as error:  # pragma: no cover - this is what must not happen
        pytest.fail(str(error))
    except OutOfMemoryError:
        pass
    assert tried


def test_the_answer_that_it_says_would_fit_does_fit(near, monkeypatch):
    monkeypatch.setattr(admission_file, "DOUBT", 0.0)
    learnt(near, text="hello")
    state, prompt = near.engine.state, _prompt_of(near, "hello")
    asked = partial(state.admission.check, state.conversations.get("main"), prompt, 0)
    whole = asked(3500)
    monkeypatch.setattr(state.accelerator, "headroom", lambda: whole.adds["decode"] - 40 * state.pool.page_bytes)
    with pytest.raises(AdmissionError):
        asked(3500)
    state.admission.settle()
    with pytest.raises(AdmissionError) as caught:  # by now it knows what other settings would need
        asked(3500)
    advice = next(one for one in caught.value.remedies if one.startswith("an answer of at most "))
    tokens = int(advice.split()[5].replace(",", ""))
    assert 3500 - 43 * 16 < tokens < 3500 - 39 * 16
    assert asked(tokens).missing <= 0
    on_demand = "modules.vision='on-demand' (an image waits for its weights)"
    assert on_demand in caught.value.remedies
    near.drop("main")


def test_a_turn_is_tried_while_its_plan_is_not_known(wb, monkeypatch):
    wb.policy = MemoryPolicy(budget=64 * GiB)
    admission, waiting = wb.engine.state.admission, []
    monkeypatch.setattr(admission, "_planner", None)
    monkeypatch.setattr(admission, "_later", waiting.append)
    wb.chat("hello", max_new_tokens=2).result(60)
    assert len(waiting) == 1
    assert admission.price(100, 10) is None


def test_a_cpu_with_room_and_no_budget_is_not_recorded(wb, monkeypatch):
    admission = wb.engine.state.admission
    monkeypatch.setattr(admission, "_planner", None)
    monkeypatch.setattr(admission, "_later", lambda job: pytest.fail("nothing is to be recorded"))
    monkeypatch.setattr(wb.engine.state.accelerator, "headroom", lambda: 64 * GiB)
    assert wb.chat("hello", max_new_tokens=2).result(60).text is not None


def test_asking_again_records_nothing(near, monkeypatch):
    for step in ("prefill", "decode", "encode", "whole"):
        monkeypatch.delattr(TracedModel, step)
    state = near.engine.state
    for tokens in (100, 300, 900):
        found = state.admission.check(state.conversations.get("main"), _prompt_of(near, LONG), 0, tokens)
        assert found is not None and found.adds["decode"] > 0
    near.drop("main")


def test_the_price_of_a_request_is_its_pages_and_what_comes_and_goes(near):
    pool = near.engine.state.pool
    lasting, passing = near.engine.price(800, 200)
    assert lasting == -(-1000 // 16) * pool.page_bytes
    assert passing > 1 * MiB
    assert near.engine.price(1600, 200)[0] == -(-1800 // 16) * pool.page_bytes


def test_promises_of_answers_under_way_count(near):
    state = near.engine.state
    other, main = state.conversations.get("other"), state.conversations.get("main")
    other.busy = main.busy = True
    prompt = _prompt_of(near, LONG)
    state.admission.check(main, prompt, 0, 50)
    state.admission.settle()  # a batch of two is recorded
    alone = state.admission.check(main, prompt, 0, 50)
    state.admission.check(other, prompt, 0, 500)
    beside = state.admission.check(main, prompt, 0, 50)
    other.busy = main.busy = False
    assert beside.adds["decode"] - alone.adds["decode"] >= 60 * state.pool.page_bytes
    assert beside.others
    for name in ("main", "other"):
        near.drop(name)


def _prompt_of(wb: lab.Workbench, text: str):
    from autoglm_lab.engine.messages import read_messages
    from autoglm_lab.engine.prompt import render

    messages = read_messages([{"role": "user", "content": [{"type": "text", "text": text}]}])
    return render(wb.model, wb.processor, messages)


def test_an_answers_peaks_are_kept_beside_what_was_predicted(near):
    if not near.engine.state.meter._marks.available:
        pytest.skip("this system keeps no peaks")
    admission = near.engine.state.admission
    before = admission.errors()
    near.chat(LONG, max_new_tokens=4).result(60)
    admission.settle()
    errors = admission.errors()
    assert errors is not None and errors.count == 1 + (0 if before is None else before.count)
    entry = PlanRecord().entries(near.engine.state.accelerator.name)[-1]
    assert entry.model == "autoglm-tiny"
    assert set(entry.predicted) == set(entry.measured) >= {"prefill", "decode"}
    assert entry.context == near.engine.state.accelerator.context


def test_a_turn_does_not_mind_a_record_that_cannot_be_written(near, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(near.engine.state.admission, "_record", PlanRecord(tmp_path / "file" / "plans.jsonl"))
    answer = near.chat(LONG, max_new_tokens=4).result(60)
    near.engine.state.admission.settle()
    assert answer.finish_reason in ("stop", "length")
    assert near.engine.state.admission.errors() is None


def test_weights_in_another_precision_are_learnt_anew(near, monkeypatch):
    state = near.engine.state
    asked = partial(state.admission.check, state.conversations.get("main"), _prompt_of(near, LONG), 0, 50)
    assert asked() is not None
    waiting = []
    monkeypatch.setattr(state.admission, "_later", waiting.append)
    before, state.policy = state.policy, state.policy.replace(modules={"text": {"precision": "int8"}})
    found, state.policy = asked(), before
    assert found is None and len(waiting) == 1
    near.drop("main")
