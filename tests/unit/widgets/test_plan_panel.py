from __future__ import annotations

import pytest

import autoglm_lab as lab
from autoglm_lab.errors import AdmissionError
from autoglm_lab.memory.planning.activations import Activations
from autoglm_lab.memory.planning.plan import Alternative, Plan
from autoglm_lab.memory.planning.plan_record import PlanErrors
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.widgets.labels import labels_of
from autoglm_lab.widgets.plan_panel import alternative, context_steps, difference
from tests.unit.widgets.browser import browser_sends, until

MiB = 1 << 20


@pytest.fixture
def panel(dashboard):
    until(lambda: dashboard.plan.state.get("verdict"), "the first plan", 60)
    return dashboard.plan


def works_for(panel, **workload):
    for figure, value in workload.items():
        browser_sends(panel, "workload", figure=figure, value=value)
    until(lambda: all(panel.state[figure] == value for figure, value in workload.items()), "the workload")
    until(lambda: "plan" not in panel.busy, "the plan", 60)


def limited(wb, panel, fewest: int, most: int) -> None:
    """A budget under which ``fewest`` conversations fit and ``most`` do not."""
    works = [lab.Workload(2048, wb.policy.generation.max_new_tokens, 1, conversations=n) for n in (fewest, most)]
    wb.policy = MemoryPolicy(budget=sum(wb.plan(None, work).largest.needed for work in works) // 2)
    until(lambda: panel.state["limit"] == wb.policy.budget, "the limit")


def row(panel, name):
    return next((one for one in panel.state["rows"] if one["name"] == name), None)


def test_the_plan_is_that_of_the_workbench(wb, panel):
    works_for(panel, context=2048, images=1, conversations=2)
    workload = lab.Workload(2048, wb.policy.generation.max_new_tokens, images=1, conversations=2)
    plan: Plan = wb.plan(None, workload)
    assert panel.state["phase"] == plan.largest.name
    assert panel.state["planned"] == pytest.approx(plan.largest.needed, abs=8 * MiB)
    assert row(panel, "KV")["planned"] == sum(one.nbytes for one in plan.largest.rows if one.kind == "kv")
    assert row(panel, "text")["planned"] == row(panel, "text")["measured"] == wb.memory.nbytes("text")
    assert sum(one["planned"] for one in panel.state["rows"]) == panel.state["planned"]
    assert panel.state["verdict"] == "fits"
    assert panel.state["by"] == "device"
    assert panel.warning is None


def test_moving_a_switch_changes_the_plan(wb, panel):
    works_for(panel, context=2048)
    before = row(panel, "KV")["planned"]
    browser_sends(panel.host.kv, "set", setting="precision", value="int8")
    until(lambda: row(panel, "KV")["planned"] <= 0.53 * before, "the plan to follow")
    quantised = row(panel, "KV")["planned"]
    works_for(panel, conversations=4)
    assert row(panel, "KV")["planned"] == pytest.approx(4 * quantised, rel=0.2)


def test_a_switch_waits_for_no_trace_once_the_engine_has_rested(wb, panel, monkeypatch):
    works_for(panel, context=2048, images=1)
    wb.engine.state.admission.settle()
    monkeypatch.setattr(Activations, "_traced", property(lambda _: pytest.fail("something was traced")))
    kept = row(panel, "KV")["planned"]
    works_for(panel, images=3)
    works_for(panel, context=512)
    until(lambda: row(panel, "KV")["planned"] < kept, "the plan to follow")
    browser_sends(panel.host.kv, "set", setting="precision", value="int8")
    until(lambda: panel.state["verdict"] == "fits" and "plan" not in panel.busy, "the plan", 60)
    assert not panel.problem
    assert not any("could not be traced" in note for note in panel.state["notes"])


def test_what_is_parked_is_not_planned_to_be_there(wb, panel):
    works_for(panel, images=0)
    assert row(panel, "vision")["planned"] > 0
    wb.policy = MemoryPolicy(modules={"vision": "off"})
    until(lambda: row(panel, "vision") is None, "vision to leave the plan and the device")


def test_what_does_not_fit_is_told_before_sending_and_an_alternative_makes_it_fit(wb, dashboard, panel):
    works_for(panel, context=2048, conversations=1)
    limited(wb, panel, 1, 16)
    works_for(panel, conversations=16)
    until(lambda: panel.state["alternatives"], "alternatives", 60)
    assert panel.state["verdict"] == "fits with changes"
    assert panel.state["by"] == "budget"
    until(lambda: dashboard.chat.state["warning"], "the warning above the input")
    warning = dashboard.chat.state["warning"]
    assert warning["missing"] == -panel.state["margin"] > 0
    assert (warning["context"], warning["conversations"]) == (2048, 16)

    first = panel.state["alternatives"][0]
    assert first["fits"]
    browser_sends(panel, "apply", change=first["change"])
    until(lambda: panel.state["verdict"] == "fits", "it to fit", 60)
    assert wb.policy != MemoryPolicy(budget=wb.policy.budget)
    until(lambda: dashboard.chat.state["warning"] is None, "the warning to go")


def test_a_question_is_sent_all_the_same(wb, dashboard, panel):
    works_for(panel, context=2048)
    limited(wb, panel, 1, 16)
    works_for(panel, conversations=16)
    until(lambda: dashboard.chat.state["warning"], "the warning", 60)
    browser_sends(dashboard.chat, "send", text="你是谁?", files=[])
    until(lambda: any(info.turns for info in wb.conversations), "the answer", 60)


def test_what_was_refused_can_be_sent_anyway(wb, dashboard, panel, monkeypatch):
    forced = []

    def check(*_, force):
        forced.append(force)
        if not force:
            raise AdmissionError("decode", 3 * MiB, 1 * MiB, ["an answer of at most 9 tokens"])

    monkeypatch.setattr(wb.engine.state.admission, "check", check)
    chat = dashboard.chat
    assert chat.state["can_force"] and not chat.state["refused"]
    browser_sends(chat, "send", text="你是谁?", files=[])
    until(lambda: chat.state["refused"], "the refusal", 60)
    until(
        lambda: "refused before it was tried: decode needs 3.0 MiB" in str(chat.messages[-1].get("error")), "the error"
    )
    browser_sends(chat, "again")
    until(lambda: any(info.turns for info in wb.conversations), "the answer", 60)
    until(lambda: not chat.state["refused"], "the refusal to go")
    browser_sends(chat, "send", text="再说一次", files=[], force=True)
    until(lambda: sum(info.turns for info in wb.conversations) == 2, "the second answer", 60)
    assert forced == [False, True, True]


def test_how_far_off_plans_were_is_told(wb, panel, monkeypatch):
    monkeypatch.setattr(wb.engine.state.admission, "errors", lambda: PlanErrors(last=-0.012, median=0.008, count=5))
    works_for(panel, context=512)
    until(lambda: panel.state["errors"] == {"last": -0.012, "median": 0.008, "count": 5}, "the errors")
    for lang in ("en", "zh"):
        assert "{last}" in labels_of("plan_panel", lang)["errors"]


def test_an_unknown_figure_of_the_workload_is_refused_in_words(panel):
    browser_sends(panel, "workload", figure="hopes", value=1)
    until(lambda: "a workload has context, images and conversations, not 'hopes'" in panel.problem, "the error")


def test_the_answers_length_is_that_of_the_policy(wb, panel):
    wb.policy = MemoryPolicy(generation={"max_new_tokens": 64})
    until(lambda: panel.state["new_tokens"] == 64, "the plan to know it")
    assert panel.state["steps"][-1] == 4096 - 64


def test_every_cost_of_an_alternative_has_a_word(wb, panel):
    budget = wb.memory.process + 60 * MiB
    plan = wb.plan(MemoryPolicy(budget=budget), lab.Workload(3800, 200, images=1, audio_seconds=2, conversations=16))
    from autoglm_lab.widgets.plan_panel import alternative

    costs = {cost for one in plan.alternatives for cost in alternative(plan, one)["costs"]}
    assert {"precision", "max_tokens"} <= costs
    also = {"on-demand vision", "on-demand audio", "off vision", "off audio", "chunk", "place", "graphs"}
    assert {f"cost {cost}" for cost in costs | also} <= labels_of("plan_panel", "zh").keys()


def test_the_difference_of_two_policies_makes_one_of_the_other():
    old = MemoryPolicy(modules={"vision": "on-demand"}, kv={"max_tokens": 512}, budget="1GiB")
    new = old.replace(modules={"audio": "off"}, kv={"precision": "int8"})
    assert difference(old, old) == {}
    changes = difference(old, new)
    assert changes["kv"] == {"precision": "int8"}
    assert set(changes) == {"modules", "kv"}
    assert old.replace(**changes) == new
    assert MemoryPolicy(pinned="1GiB").replace(**changes).pinned == 1 << 30


def test_the_prompt_slider_ends_where_the_model_does():
    assert context_steps(4096, 256) == [256, 512, 1024, 2048, 3840]
    assert context_steps(None, 256)[-1] == 131072 - 256


def test_fewer_tokens_of_an_image_are_an_alternative_with_its_price_in_words(wb):
    plan = wb.plan(MemoryPolicy(), lab.Workload(2048, 64, 1))
    fewer = plan.policy.replace(max_image_tokens=512)
    one = alternative(plan, Alternative(fewer, "max_image_tokens=512", "", True, 1, 1, True))
    assert one["costs"] == ["max_image_tokens"]
    for lang in ("en", "zh"):
        assert labels_of("plan_panel", lang)["cost max_image_tokens"]
