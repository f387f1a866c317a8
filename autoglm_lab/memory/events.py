"""Events: something that happened to the memory at a time, how long it took, how many bytes, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from autoglm_lab.units import format_bytes, format_seconds

EventKind = Literal[
    "loaded",
    "woke",
    "parked",
    "spilled",
    "reclaimed",
    "evicted",
    "dropped",
    "budget",
    "policy",
    "out of memory",
    "note",
]


@dataclass(frozen=True, repr=False)
class Event:
    """One event.

    Attributes:
        time: seconds since the epoch at its end.
        kind: what happened.
        subject: the module, conversation or setting it happened to.
        nbytes: bytes moved or freed; None where bytes have no part in it.
        seconds: how long it took; None where that has no meaning.
        why: the cause, in a few words.
    """

    time: float
    kind: EventKind
    subject: str
    nbytes: int | None = None
    seconds: float | None = None
    why: str = ""

    def __str__(self) -> str:
        parts = [self.kind, self.subject]
        if self.seconds is not None:
            parts.append(format_seconds(self.seconds))
        if self.nbytes is not None:
            parts.append(format_bytes(self.nbytes))
        if self.why:
            parts.append(f"({self.why})")
        return " ".join(parts)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
