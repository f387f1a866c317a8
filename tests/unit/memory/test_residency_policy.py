"""What a policy says of modules: which are loaded, which may be used, and which go when idle."""

from __future__ import annotations

import time

import pytest

from autoglm_lab.errors import ModuleError, ModuleOffError, OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.policy import MemoryPolicy
from tests.unit.memory.conftest import IDS, Build


def test_only_what_the_policy_keeps_is_loaded(build: Build) -> None:
    residency = build(policy=MemoryPolicy(modules={"vision": "on-demand", "projector": "off"}))
    loaded = residency.materialise()
    assert [(event.kind, event.subject) for event in loaded] == [("loaded", "text"), ("loaded", "head")]
    assert (residency["vision"].place, residency["projector"].place) == ("disk", "disk")
    assert [event.subject for event in residency.ensure(["vision", "text"], "an image")] == ["vision"]
    with pytest.raises(ModuleOffError, match=r"needs the module 'projector' \(an image\)"):
        residency.ensure(["vision", "projector"], "an image")


def test_a_forward_of_a_module_that_is_off_is_refused(loaded: Residency) -> None:
    loaded.apply(MemoryPolicy(modules={"text": "off"}))
    with pytest.raises(ModuleOffError, match=r"set modules\.text\.residency to 'keep' or 'on-demand'"):
        loaded.model(input_ids=IDS)
    assert loaded["text"].place == "disk"
    loaded.apply(MemoryPolicy())
    assert loaded["text"].place == "device"
    loaded["text"].park()  # the refused forward is not taken for one that still runs


def test_a_policy_that_cannot_be_obeyed_moves_nothing(loaded: Residency, accelerator: Accelerator) -> None:
    before = loaded.policy
    with pytest.raises(ModuleError, match="the device is the host"):
        loaded.apply(MemoryPolicy(modules={"vision": "off", "text": {"residency": "on-demand", "park_to": "host"}}))
    assert all(module.place == "device" for module in loaded.values())
    loaded["text"].park()
    accelerator.set_budget(accelerator.context)
    with pytest.raises(OutOfMemoryError):
        loaded.apply(MemoryPolicy(modules={"text": {"keep_alive": 5}}))
    assert loaded.policy is before


def test_what_was_parked_by_hand_stays_parked_when_something_else_changes(loaded: Residency) -> None:
    loaded["vision"].park()
    assert loaded.apply(loaded.policy.replace(kv={"max_tokens": 64}, modules={"text": {"keep_alive": 5}})) == []
    assert loaded["vision"].place == "disk"
    loaded.apply(loaded.policy.replace(modules={"vision": {"keep_alive": 5}}))
    assert loaded["vision"].place == "device"


def test_a_policy_for_another_model_is_refused_at_once(build: Build) -> None:
    with pytest.raises(ModuleError, match="no module 'audio'"):
        build(policy=MemoryPolicy(modules={"audio": "off"}))


def test_idle_modules_on_demand_are_parked_and_others_stay(build: Build, events: list[Event]) -> None:
    residency = build(policy=MemoryPolicy(modules={"vision": {"residency": "on-demand", "keep_alive": 5}}))
    residency.materialise()
    residency.ensure(["vision"], "an image")
    now = time.time()
    assert residency.tick(now + 1) == []
    (event,) = residency.tick(now + 6)
    assert (event.kind, event.subject, event.why) == ("parked", "vision", "idle for 5 s; to disk")
    assert residency.tick(now + 60) == []
    assert residency["text"].place == "device"


def test_a_module_that_cannot_go_when_idle_is_noted_not_raised(loaded: Residency, events: list[Event]) -> None:
    loaded.apply(MemoryPolicy(modules={"head": {"residency": "on-demand", "keep_alive": 0}}))
    mine = loaded.model.lm_head.weight.detach()
    (event,) = loaded.tick(time.time() + 1)
    assert event.kind == "note"
    assert "still views its weights" in event.why
    assert mine.isfinite().all()
