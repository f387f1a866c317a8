"""What a person is likely to ask of a plan next, so that it can be traced before they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autoglm_lab.memory.planning.planner import Planner
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.precision import MIXED
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.schedule import FEED_FORWARD_TOKENS

_SMALLER = 1024


def likely(planner: Planner, policy: MemoryPolicy, workload: Workload) -> Iterator[tuple[MemoryPolicy, Workload]]:
    """Settings and workloads one step away whose plans take a trace of their own, the likeliest first.

    Two sizes of an image are enough for every size, a long and a short chunk for every length.
    """
    if "vision" in planner.modules:
        seen = replace(workload, images=max(1, workload.images))
        yield policy, seen
        yield policy.replace(max_image_tokens=_SMALLER), seen
    for chunk in (min(policy.kv.chunk, workload.context) // 2, FEED_FORWARD_TOKENS // 2):
        if 64 <= chunk < workload.context:
            yield policy.replace(kv={"chunk": chunk}), workload
    yield policy, replace(workload, context=FEED_FORWARD_TOKENS // 2)
    yield policy, replace(workload, conversations=2 if workload.conversations == 1 else 1)
    for precision in ("int8", "int4"):
        yield policy.replace(kv={"precision": precision}), workload
    if planner.device.kind == "cuda":
        yield policy.replace(kv={"graphs": not policy.kv.graphs}), workload
    for precisions in MIXED.values():
        asked = {name: {"precision": one} for name, one in precisions.items() if name in planner.modules}
        rounded = policy.replace(modules=asked)
        if not policy.precisions() and planner.can_keep(rounded):
            yield rounded, workload
