"""After what is likely was planned, no switch and no slider waits for a trace."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoglm_lab.memory.planning.activations import Activations
from autoglm_lab.memory.planning.device_constants import plan_device
from autoglm_lab.memory.planning.likely import likely
from autoglm_lab.memory.planning.planner import Planner
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.loading import outline
from autoglm_lab.policy import MemoryPolicy

BASE = Workload(context=2048, new_tokens=64, images=1)
MOVES = [
    (MemoryPolicy(), replace(BASE, images=3)),
    (MemoryPolicy(), replace(BASE, images=1, image_size=(700, 500))),
    (MemoryPolicy(max_image_tokens=64), BASE),
    (MemoryPolicy(kv={"chunk": 300}), BASE),
    (MemoryPolicy(kv={"precision": "int8"}), replace(BASE, context=3000)),
    (MemoryPolicy(kv={"precision": "int4"}), replace(BASE, new_tokens=500)),
    (MemoryPolicy(), replace(BASE, conversations=2)),
    (MemoryPolicy(kv={"place": "host"}), BASE),
    (MemoryPolicy(kv={"graphs": False}), BASE),
    (MemoryPolicy(kv={"max_tokens": 512, "overflow": "window"}), BASE),
    (MemoryPolicy(modules={"vision": "on-demand"}), BASE),
    (MemoryPolicy(budget="256MiB"), BASE),
]


@pytest.fixture(scope="module")
def ready() -> Planner:
    planner = Planner(outline("autoglm-tiny"), plan_device("RTX 4090", None, None))
    planner.plan(MemoryPolicy(), BASE, search=False)
    for policy, workload in likely(planner, MemoryPolicy(), BASE):
        planner.plan(policy, workload, search=False)
    return planner


@pytest.mark.parametrize(("policy", "workload"), MOVES)
def test_a_move_traces_nothing(
    ready: Planner, policy: MemoryPolicy, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Activations, "_traced", property(lambda _: pytest.fail("something was traced")))
    plan = ready.plan(policy, workload, search=False)
    assert not any("could not be traced" in note for note in plan.notes)
