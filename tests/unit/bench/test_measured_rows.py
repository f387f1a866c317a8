"""Plans of rows that were measured on a GPU, made here without one: what is neither weights nor context, in MiB."""

from __future__ import annotations

import pytest

from autoglm_lab.bench import plan_rows
from autoglm_lab.bench.plan import shapes_of
from autoglm_lab.memory.planning.device_constants import plan_device
from autoglm_lab.memory.planning.plan import PhasePlan
from autoglm_lab.memory.planning.planner import Planner, planner
from autoglm_lab.units import MiB

# `autoglm-lab bench plan --full` on an H200, 2026-11-23; see docs/benchmarks.md.
MEASURED = {
    "phone, a screenshot": 1464,
    "phone, 8,192 tokens in a window of 4,096": 376,
    "article, 512 tokens": 178,
    "article, 3 image(s)": 276,
    "article, 1,024 tokens, 8 conversations": 344,
    "qwen2.5, 3 screenshots of 644 x 1,484": 696,
    "gemma, 4,096 tokens": 716,
    "gemma, an image": 260,
    "gemma, 3 images": 688,
}


@pytest.fixture(scope="module")
def planners() -> dict[str, Planner]:
    return {}


@pytest.mark.parametrize("name", MEASURED)
def test_the_rest_is_within_five_per_cent_of_what_was_measured(name: str, planners: dict[str, Planner]) -> None:
    row = next(row for row in plan_rows.accuracy() if row.name == name)
    if row.model not in planners:
        shapes = shapes_of(row.model, row.dtype, "cuda", small=False)
        planners[row.model] = planner(shapes, plan_device("H200", None, None))
    phases = planners[row.model].plan(row.policy, row.workload, search=False).phases
    rest = max(map(_rest, phases))
    assert rest == pytest.approx(MEASURED[name] * MiB, rel=0.05)


def _rest(phase: PhasePlan) -> int:
    return phase.nbytes - sum(phase.of_kind(kind) for kind in ("weights", "context", "unattributed"))
