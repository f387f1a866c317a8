"""Changing the policy from a panel."""

from __future__ import annotations

import threading
from typing import Any

from autoglm_lab.policy import MemoryPolicy, ModulePolicy
from autoglm_lab.widgets.snapshot import Bench

_one_at_a_time = threading.Lock()


def set_policy(bench: Bench, **changes: Any) -> None:
    """Merge ``changes`` into the policy as it is at that moment, so that two changes in a row both hold.

    Modules that are back at their defaults leave the policy, which stays as short as it can be said.

    Raises:
        PolicyError: a value cannot be; the policy is as before.
    """
    with _one_at_a_time:
        policy = bench.policy.replace(**changes)
        said = {name: module for name, module in policy.modules.items() if module != ModulePolicy()}
        bench.policy = MemoryPolicy(**(policy.model_dump() | {"modules": {n: m.model_dump() for n, m in said.items()}}))
