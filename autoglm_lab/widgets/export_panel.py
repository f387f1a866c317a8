"""The settings one arrived at, to take away: as YAML, and the same in Python."""

from __future__ import annotations

from typing import Any

from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.snapshot import Snapshot


def as_python(policy: MemoryPolicy, source: str) -> str:
    """A program that loads ``source`` with this policy."""
    return f"import autoglm_lab as lab\n\nwb = lab.load({source!r})\n{policy.to_python()}\n"


class ExportPanel(Panel):
    """The policy as YAML and as Python."""

    name = "export_panel"

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        policy = snapshot.policy
        return {"yaml": policy.to_yaml(), "python": as_python(policy, snapshot.capabilities.model)}
