"""A module as people see it in a list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autoglm_lab.memory.events import Event


@dataclass(frozen=True)
class ModuleInfo:
    """A module as the dashboard lists it.

    Attributes:
        place: where its weights are now; ``moving`` while they are under way.
        nbytes: bytes of its weights when on the device.
        last_event: the last wake or park, None before the first.
        note: what its anatomy could not tell apart, or why its host copy is slow; empty where there is nothing to say.
    """

    name: str
    place: Literal["device", "host", "disk", "moving"]
    nbytes: int
    dtype: str
    last_event: Event | None = None
    note: str = ""
