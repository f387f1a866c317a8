from __future__ import annotations

import gc
import sys
import traceback
import weakref

import pytest
import torch

from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.ledger import Ledger, Row
from autoglm_lab.memory.reclaim import Reclaimer
from autoglm_lab.policy import ReclaimPolicy


def ledger(cached: int) -> Ledger:
    return Ledger("device", 100, 50, (Row("allocator cache", "allocator cache", "device", cached),), 0.0)


def test_it_is_due_by_count_or_by_share(accelerator: Accelerator) -> None:
    reclaimer = Reclaimer(accelerator)
    assert reclaimer.due(10, ledger(0), ReclaimPolicy()) == "every 10 answers"
    assert reclaimer.due(9, ledger(20), ReclaimPolicy()) == ""
    assert reclaimer.due(0, ledger(21), ReclaimPolicy()) == "more than 20 % of the device cached"
    assert not reclaimer.due(99, ledger(99), ReclaimPolicy(every_answers=None, cached_share=None))


def test_reclaiming_tells_what_it_gained(accelerator: Accelerator) -> None:
    blocks = [torch.ones(50_000, dtype=torch.uint8) for _ in range(2000)]
    blocks.clear()
    event = Reclaimer(accelerator).reclaim("asked")
    assert (event.kind, event.why) == ("reclaimed", "asked")
    assert event.nbytes is not None
    assert event.seconds is not None


class Held:
    """Something large in a frame."""


def test_the_last_traceback_lets_go_when_asked(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> weakref.ref[Held]:
        held = Held()
        alive.append(weakref.ref(held))
        raise RuntimeError("out of memory")

    alive: list[weakref.ref[Held]] = []
    try:
        fail()
    except RuntimeError as error:
        frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]  # whoever shows it does so
        monkeypatch.setattr(sys, "last_exc", error, raising=False)
    assert "held" in frames[-1]
    del frames
    gc.collect()
    assert alive[0]() is not None
    Reclaimer(accelerator).reclaim("asked")
    assert alive[0]() is not None
    Reclaimer(accelerator).reclaim("asked", clear_traceback=True)
    assert alive[0]() is None
