"""A budget that is set while something is held: the policy's own means bring it under, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.errors import PolicyError
from autoglm_lab.units import MiB


@pytest.fixture
def own() -> Iterator[lab.Workbench]:
    with lab.load("autoglm-tiny", device="cpu") as workbench:
        yield workbench


def held(wb: lab.Workbench) -> int:
    wb.reclaim()
    process = wb.memory.process
    assert process is not None
    return process


def test_a_budget_below_what_is_held_parks_what_is_on_demand_and_forgets_idle_kv(own: lab.Workbench) -> None:
    own.chat("你是谁?", max_new_tokens=4).result(60)
    vision = own.modules["vision"].info.nbytes
    own.policy = own.policy.replace(modules={"vision": "on-demand"}, budget=held(own) - vision // 2)
    assert own.modules["vision"].info.place == "disk"
    assert [info.kv_bytes for info in own.conversations] == [0]
    parked = [event for event in own.events if event.kind == "parked"]
    assert "the budget is smaller" in parked[-1].why


def test_a_budget_that_cannot_be_kept_is_refused_and_the_policy_stays(own: lab.Workbench) -> None:
    before = own.policy
    with pytest.raises(PolicyError, match=r"a budget of 1.0 MiB is less than .*\(context .*, text .*set a larger one"):
        own.policy = own.policy.replace(budget=MiB)
    assert own.policy == before
    assert own.memory.budget is None
    assert own.engine.state.accelerator.budget is None
    assert own.chat("你是谁?").result(60).text


def test_a_refused_budget_leaves_the_modules_as_they_were(own: lab.Workbench) -> None:
    with pytest.raises(PolicyError, match="is less than"):
        own.policy = own.policy.replace(modules={"audio": "off"}, budget=MiB)
    assert own.modules["audio"].info.place == "device"
    assert own.policy.module("audio").residency == "keep"


def test_closing_lifts_the_cap(own: lab.Workbench) -> None:
    own.policy = own.policy.replace(budget=held(own) + 512 * MiB)
    own.close()
    assert own.engine.state.accelerator.budget is None


def test_expandable_segments_on_a_cpu_are_a_note(own: lab.Workbench) -> None:
    own.policy = own.policy.replace(reclaim={"expandable_segments": True})
    notes = [event for event in own.events if event.kind == "note" and event.subject == "reclaim"]
    if not torch.cuda.is_available():
        assert notes[-1].why.startswith("reclaim.expandable_segments has no effect on a CPU")
