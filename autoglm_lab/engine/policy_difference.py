"""What changed between two policies, as `MemoryPolicy.replace` and a server of ours take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoglm_lab.policy import MemoryPolicy, ModulePolicy


def difference(old: MemoryPolicy, new: MemoryPolicy) -> dict[str, Any]:
    """The settings of ``new`` that ``old`` does not have; those that are back at their default too."""
    before, after = old.model_dump(), new.model_dump()
    plain = ModulePolicy().model_dump()
    for module in {*before["modules"], *after["modules"]}:
        before["modules"].setdefault(module, plain)
        after["modules"].setdefault(module, plain)
    return _between(before, after)


def _between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for name, value in after.items():
        other = before.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            inner = _between(other, value)
            changed |= {name: inner} if inner else {}
        elif value != other:
            changed[name] = value
    return changed
