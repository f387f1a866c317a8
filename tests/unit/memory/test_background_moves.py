from __future__ import annotations

import threading
import time

import pytest
import torch

from autoglm_lab.errors import ModuleError, OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency import backing
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.policy import MemoryPolicy
from tests.unit.memory.busy_device import BusyDevice, pretend
from tests.unit.memory.conftest import Build, checksums, logits


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator) -> BusyDevice:
    return pretend(monkeypatch, accelerator)


@pytest.fixture
def loaded(device: BusyDevice, build: Build) -> Residency:
    residency = build()
    residency.materialise()
    return residency


def test_a_park_returns_while_the_device_is_busy_and_shows_as_its_event(loaded: Residency, device: BusyDevice) -> None:
    vision = loaded["vision"]
    held = next(row for row in vision.holdings() if row.place == "device").nbytes
    device.idle.clear()
    move = vision.park(why="asked")
    assert not move.done
    assert (vision.place, vision.at) == ("moving", "host")
    assert [row.nbytes for row in vision.holdings() if row.place == "device"] == [held]
    threading.Timer(0.05, device.idle.set).start()
    event = move.result(10)
    assert (event.kind, event.nbytes, event.why) == ("parked", held, "asked; to host; first host copy made")
    assert event.seconds is not None and event.seconds >= 0.04
    assert repr(move) == str(event)
    assert (move.subject, move.to_dict()) == ("vision", event.to_dict())
    assert vision.place == "host"
    assert [row.place for row in vision.holdings()] == ["host"]


def test_the_second_park_copies_nothing(loaded: Residency, device: BusyDevice) -> None:
    sums = checksums(loaded)
    for _ in range(20):
        for module in loaded.values():
            module.park()
        for module in loaded.values():
            module.wake()
    assert checksums(loaded) == sums
    assert device.fetched == len(loaded)
    assert device.brought == 20 * len(loaded)
    assert loaded["text"].park().why == "to host"


def test_a_wake_waits_for_the_park_before_it(loaded: Residency, device: BusyDevice, accelerator: Accelerator) -> None:
    expected, slabs = logits(loaded), accelerator.reading().slabs
    device.idle.clear()
    parked = loaded["text"].park()
    threading.Timer(0.05, device.idle.set).start()
    woken = loaded["text"].wake()
    assert parked.done
    assert torch.equal(logits(loaded), expected)
    assert woken.result(10).why == "from host"
    assert accelerator.reading().slabs == slabs


def test_a_wake_returns_while_the_weights_come_and_a_park_need_not_wait_for_it(
    loaded: Residency, device: BusyDevice
) -> None:
    expected = logits(loaded)
    loaded["text"].park().result(10)
    device.idle.clear()
    woken = loaded["text"].wake("a turn")
    assert loaded["text"].wake() is woken
    assert loaded.ensure(["text"], "a turn") == []
    assert (loaded["text"].place, loaded["text"].at) == ("moving", "device")
    parked = loaded["text"].park()
    assert not woken.done and not parked.done
    device.idle.set()
    assert [woken.result(10).kind, parked.result(10).kind] == ["woke", "parked"]
    assert loaded["text"].place == "host"
    assert torch.equal(logits(loaded), expected)


def test_changed_weights_are_copied_back_and_said_so(loaded: Residency, device: BusyDevice) -> None:
    head, weight = loaded["head"], loaded.model.lm_head.weight
    head.park()
    head.wake()
    with torch.no_grad():
        weight.add_(1)
    changed = weight.detach().clone()
    assert "the weights were changed" in head.park().why
    head.wake()
    weight.data = changed * 2
    assert "the weights were changed" in head.park("disk").why
    head.wake()
    assert torch.equal(weight, changed * 2)
    assert head.park().why == "to host; first host copy made"


def test_what_fails_in_the_background_is_told_and_raised_and_the_module_stays(
    loaded: Residency, device: BusyDevice, events: list[Event], accelerator: Accelerator
) -> None:
    expected, slabs = logits(loaded), accelerator.reading().slabs
    device.broken = ModuleError("the bus is on fire")
    move = loaded["text"].park()
    with pytest.raises(ModuleError, match="on fire"):
        move.result(10)
    with pytest.raises(ModuleError, match="on fire"):
        repr(move)
    assert (events[-1].kind, events[-1].why) == ("note", "not parked: the bus is on fire")
    device.broken = None
    assert loaded["text"].place == "device"
    assert accelerator.reading().slabs == slabs
    assert torch.equal(logits(loaded), expected)
    assert loaded["text"].park().result(10).kind == "parked"


def test_a_variable_that_views_the_weights_is_refused_at_once(loaded: Residency, device: BusyDevice) -> None:
    mine = loaded.model.lm_head.weight.detach()[:10]
    with pytest.raises(ModuleError, match="still views its weights"):
        loaded["head"].park()
    assert loaded["head"].place == "device"
    assert mine.isfinite().all()


def test_what_is_beyond_the_pinned_budget_is_pageable_and_says_so(
    build: Build, device: BusyDevice, events: list[Event]
) -> None:
    residency = build(policy=MemoryPolicy(pinned=0))
    residency.materialise()
    residency["vision"].park().result(10)
    (row,) = residency["vision"].holdings()
    assert row.counts == "host copy, pageable"
    assert "not pinned (0 B of the 0 B allowed are)" in residency["vision"].info().note
    residency.apply(MemoryPolicy(pinned="1GiB"))
    residency["text"].park().result(10)
    (row,) = residency["text"].holdings()
    assert row.counts == "host copy, pinned"
    assert residency.pinned.used == row.nbytes
    residency["text"].park("disk").result(10)
    assert residency.pinned.used == 0


def test_without_room_on_the_host_a_module_goes_to_disk(
    loaded: Residency, monkeypatch: pytest.MonkeyPatch, device: BusyDevice
) -> None:
    expected = logits(loaded)
    monkeypatch.setattr(backing, "host_memory", lambda: (1 << 30, 1 << 20))
    event = loaded["text"].park().result(10)
    assert "on disk instead of the host: the host has 1.0 MiB free" in event.why
    assert loaded["text"].place == "disk"
    assert "on disk instead of the host" in loaded["text"].info().note
    assert torch.equal(logits(loaded), expected)


def test_a_module_on_demand_is_on_the_host_when_the_model_is_loaded(build: Build, device: BusyDevice) -> None:
    residency = build(policy=MemoryPolicy(modules={"vision": "on-demand"}))
    assert [event.subject for event in residency.materialise()] == ["projector", "text", "head"]
    residency.settle()
    assert residency["vision"].place == "host"
    assert residency["vision"].info().last_event is not None
    assert residency["vision"].wake().why == "from host"


def test_a_module_that_becomes_on_demand_is_copied_ahead(loaded: Residency, device: BusyDevice) -> None:
    loaded.apply(MemoryPolicy(modules={"vision": {"residency": "on-demand", "keep_alive": 0}}))
    loaded.settle()
    assert (loaded["vision"].place, device.fetched) == ("device", 1)
    (move,) = loaded.tick(time.time() + 1)
    assert move.why == "idle for 0 s; to host"
    assert device.fetched == 1


def test_a_wake_waits_for_what_is_being_parked_before_it_says_that_there_is_no_room(
    loaded: Residency, device: BusyDevice, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = loaded["vision"].park().result(10).nbytes or 0
    room = accelerator.reading().slabs + size - 1
    monkeypatch.setattr(accelerator, "headroom", lambda: room - accelerator.reading().slabs)
    with pytest.raises(OutOfMemoryError, match="out of memory in load"):
        loaded["vision"].wake()
    device.idle.clear()
    loaded["text"].park()
    threading.Timer(0.05, device.idle.set).start()
    assert loaded["vision"].wake().result(10).kind == "woke"


def test_a_forward_wakes_what_is_being_parked(loaded: Residency, device: BusyDevice, events: list[Event]) -> None:
    expected = logits(loaded)
    device.idle.clear()
    loaded["text"].park()
    threading.Timer(0.05, device.idle.set).start()
    assert torch.equal(logits(loaded), expected)
    loaded.settle()
    assert [event.kind for event in events[-2:]] == ["parked", "woke"]


def test_closing_waits_for_moves_and_gives_every_byte_back(
    loaded: Residency, device: BusyDevice, accelerator: Accelerator
) -> None:
    device.idle.clear()
    parked = loaded["text"].park()
    threading.Timer(0.05, device.idle.set).start()
    loaded.close()
    assert parked.done
    assert (accelerator.reading().slabs, loaded.pinned.used) == (0, 0)


def test_many_threads_moving_the_same_modules_lose_nothing(
    loaded: Residency, device: BusyDevice, accelerator: Accelerator
) -> None:
    expected, slabs = logits(loaded), accelerator.reading().slabs
    problems: list[BaseException] = []

    def move(name: str) -> None:
        try:
            for _ in range(30):
                loaded[name].park()
                loaded[name].wake()
                list(loaded.holdings())
        except BaseException as error:  # noqa: BLE001 - shown below
            problems.append(error)

    threads = [threading.Thread(target=move, args=(name,)) for name in ("text", "text", "vision", "head")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    for module in loaded.values():
        module.wake()
    loaded.settle()
    assert torch.equal(logits(loaded), expected)
    assert accelerator.reading().slabs == slabs
