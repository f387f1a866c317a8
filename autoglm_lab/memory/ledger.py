"""The ledger: one reading of who owns which bytes of one device.

Owners register with a `LedgerBook` and answer for their bytes; the book knows none of them by name. The rows on the
device are disjoint and add up to its total; only ``unattributed`` is a difference.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from autoglm_lab.memory.ledger_view import html, svg, text

if TYPE_CHECKING:
    from autoglm_lab.memory.accelerator import Accelerator
    from autoglm_lab.memory.reading import Reading

Place = Literal["device", "host", "disk"]
RowKind = Literal[
    "weights",
    "kv",
    "owner",
    "activations",
    "allocator cache",
    "context",
    "driver reserved",
    "other processes",
    "unattributed",
    "free",
]


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes of one owner in one place.

    Attributes:
        name: the owner: a module (``vision``), a conversation (``KV chat``), or the kind itself.
        kind: what sort of bytes these are.
        place: ``device`` rows add up to the device's total; ``host`` and ``disk`` rows stand beside it.
        nbytes: bytes, or None where the machine cannot tell.
        counts: what the row counts and where the figure comes from, in one sentence.
        within: where in torch's device allocator the bytes lie: ``allocator``, in tensors; ``cache``, held but in no
            tensor, as a captured graph's private pool. None: memory of their own, as slabs and pages.
        card: number of the device that a ``device`` row is about, among those of its model.
    """

    name: str
    kind: RowKind
    place: Place
    nbytes: int | None
    counts: str = ""
    within: Literal["allocator", "cache"] | None = None
    card: int = 0


@dataclass(frozen=True, repr=False, slots=True)
class Ledger:
    """One reading.

    Attributes:
        device: name of the device, for people.
        card: its number among the devices of its model.
        total: bytes of the device; None: an endpoint does not tell.
        process: bytes this process holds on the device, as the driver or the kernel reports them; None: hidden.
        rows: disjoint rows, in the order they are shown.
        time: seconds since the epoch.
        phase: what the engine was doing.
        budget: bytes the policy allows the process; None: the whole device.
        notes: what this machine cannot tell, one sentence each.
    """

    device: str
    total: int | None
    process: int | None
    rows: tuple[Row, ...]
    time: float
    phase: str = "idle"
    budget: int | None = None
    notes: tuple[str, ...] = field(default=())
    card: int = 0

    def on(self, place: Place) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.place == place)

    def nbytes(self, name: str, place: Place = "device") -> int:
        """Bytes of every row with this name in this place; 0 where there is none."""
        return sum(row.nbytes or 0 for row in self.rows if row.name == name and row.place == place)

    def of_kind(self, kind: RowKind, place: Place = "device") -> int:
        return sum(row.nbytes or 0 for row in self.rows if row.kind == kind and row.place == place)

    @property
    def unattributed(self) -> int:
        return self.of_kind("unattributed")

    @property
    def free(self) -> int:
        return self.of_kind("free")

    def picture(self) -> str:
        """The device as one bar, an SVG for where no JavaScript runs."""
        return svg(self)

    def __str__(self) -> str:
        return text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(self)

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "total": self.total,
            "process": self.process,
            "budget": self.budget,
            "phase": self.phase,
            "time": self.time,
            "rows": [
                {"name": row.name, "kind": row.kind, "place": row.place, "nbytes": row.nbytes, "counts": row.counts}
                for row in self.rows
            ],
            "notes": list(self.notes),
        }


class Owner(Protocol):
    """Something that owns bytes: a module, a cache, a graph, an adapter, an optimiser."""

    def holdings(self) -> Iterable[Row]:
        """The owner's rows now. Called from the sampler's thread: cheap, and never synchronises the device."""
        ...


_TRIES = 3
_PAUSE = 0.001


class LedgerBook:
    """The owners of one model's bytes, and readings of its device, or of each of its devices.

    Owners may come and go from any thread. A reading is taken while nothing of ours changes, where that can be had, so
    that no figure straddles a change.
    """

    def __init__(self, *accelerators: Accelerator) -> None:
        self._accelerators = accelerators
        self._owners: list[Owner] = []
        self._lock = threading.Lock()

    def register(self, owner: Owner) -> None:
        """Ask ``owner`` for its rows from now on; again is no harm."""
        with self._lock:
            if not any(known is owner for known in self._owners):
                self._owners.append(owner)

    def unregister(self, owner: Owner) -> None:
        with self._lock:
            self._owners = [known for known in self._owners if known is not owner]

    @property
    def cards(self) -> int:
        """How many devices there are."""
        return len(self._accelerators)

    def read(self, phase: str = "idle", budget: int | None = None, card: int = 0) -> Ledger:
        """Who owns which bytes now.

        Args:
            phase: what the engine is doing.
            budget: bytes that the policy allows; None: what the accelerator was told.
            card: which device. What is on the host and on disk stands in the first one's.
        """
        accelerator = self._accelerators[card]
        with self._lock:
            owners = tuple(self._owners)
        for left in reversed(range(_TRIES)):
            before = accelerator.counters()
            owned = [row for owner in owners for row in owner.holdings() if row.card == card]
            reading = accelerator.reading()
            after = accelerator.counters()
            if (before == after and not after.moving) or not left:
                break
            time.sleep(_PAUSE if after.moving else 0)
        ledger = _compose(accelerator, reading, owned, phase, budget)
        if self.cards == 1:
            return ledger
        return replace(ledger, device=f"{accelerator.device} · {ledger.device}", card=card)


def _compose(accelerator: Accelerator, reading: Reading, owned: list[Row], phase: str, budget: int | None) -> Ledger:
    process = reading.process
    cuda = accelerator.kind == "cuda"
    own = [*accelerator.holdings()]
    owned += [row for row in own if row.kind in _OWNED]
    rest = [row for row in own if row.kind not in _OWNED]
    if reading.reserved is not None and reading.allocated is not None:
        pooled = sum(row.nbytes or 0 for row in owned if row.within == "cache" and row.place == "device")
        cached = max(0, reading.reserved - reading.allocated - pooled)
        rest.append(
            Row("allocator cache", "allocator cache", "device", cached, "held by torch's allocator, in no tensor")
        )
    kept = reading.driver_reserved
    if kept is not None:
        rest.append(
            Row("driver reserved", "driver reserved", "device", kept, "kept by the driver for itself (NVML memory_v2)")
        )
    claimed = sum(row.nbytes or 0 for row in (*owned, *rest) if row.place == "device" and row.kind != "driver reserved")
    held = claimed if process is None else process
    rest.append(Row("unattributed", "unattributed", "device", held - claimed, _UNATTRIBUTED[cuda]))
    others = reading.used - held
    rest.append(Row("other processes", "other processes", "device", others, _OTHERS[cuda]))
    free = reading.total - reading.used - (kept or 0)
    rest.append(Row("free", "free", "device", free, "nobody's: what any process could still take"))
    return Ledger(
        device=accelerator.name,
        total=reading.total,
        process=process,
        rows=(*sorted(owned, key=lambda row: _OWNED.index(row.kind) if row.kind in _OWNED else len(_OWNED)), *rest),
        time=reading.time,
        phase=phase,
        budget=accelerator.budget if budget is None else budget,
        notes=accelerator.notes if held >= claimed else (*accelerator.notes, _BELOW_ZERO),
    )


_OWNED: tuple[RowKind, ...] = ("weights", "kv", "owner", "activations")
_UNATTRIBUTED = {
    True: "no owner answers for it: tensors in your variables; while a phase runs, its activations too",
    False: "no owner answers for it: your variables, Python since the start; while a phase runs, its activations too",
}
_OTHERS = {
    True: "in use on the device as the driver reports it, less this process",
    False: "other programs and the kernel, less this process; droppable file pages are free",
}
_BELOW_ZERO = (
    "unattributed is below zero: the kernel's counters lag by some MiB, or memory that was counted as context went back"
)
