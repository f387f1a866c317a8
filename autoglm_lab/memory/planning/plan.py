"""A plan: the predicted peak of every phase, by the rows of the ledger, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from autoglm_lab.memory.ledger import RowKind
from autoglm_lab.memory.planning.plan_view import html, text
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.policy import MemoryPolicy

PlannedPhase = Literal["load", "encode", "prefill", "decode", "train"]
Verdict = Literal["fits", "fits with changes", "does not fit"]


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Predicted bytes on the device, named and sorted as a row of the ledger.

    Attributes:
        counts: what is counted, or why it is an estimate; in a sentence.
        spare: it is there only while there is room, and goes where memory is short.
    """

    name: str
    kind: RowKind
    nbytes: int
    counts: str = ""
    spare: bool = False


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """The peak of one phase.

    Attributes:
        rows: what is there at the moment of the peak.
    """

    name: PlannedPhase
    rows: tuple[PlanRow, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the driver will show for this process at most, where there is room for all of it."""
        return sum(row.nbytes for row in self.rows)

    @property
    def needed(self) -> int:
        """Bytes without which it does not go: those that would make way are left out."""
        return sum(row.nbytes for row in self.rows if not row.spare)

    def of_kind(self, kind: RowKind) -> int:
        return sum(row.nbytes for row in self.rows if row.kind == kind)

    def of(self, name: str) -> int:
        """Bytes of the rows with this name; 0 where there is none."""
        return sum(row.nbytes for row in self.rows if row.name == name)


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another policy, and what it would change.

    Attributes:
        policy: the whole policy, ready to be used.
        change: the settings that differ, as a person writes them.
        costs: in speed and quality, in a sentence.
        lossy: whether answers may differ.
        nbytes: what the largest phase needs under it.
        frees: bytes less than under the policy that was asked for.
        fits: whether it fits the limit.
        reload: whether it counts when a model is loaded, not on one that is open.
    """

    policy: MemoryPolicy
    change: str
    costs: str
    lossy: bool
    nbytes: int
    frees: int
    fits: bool
    reload: bool = False


@dataclass(frozen=True, repr=False)
class Plan:
    """What one model needs under one policy for one workload.

    Attributes:
        model: its name.
        dtype: of the weights.
        device: the device's name.
        limit: bytes that the process may use: the budget, and no more than the device can give now.
        phases: those that the workload goes through, in order; of a training, those of loading, encoding and one step.
        alternatives: policies that need less, best first; where the plan fits there are none.
        notes: what is estimated and what is not counted, one sentence each.
        why: why this policy, in two lines, where it was chosen and not given; see `plan_choice`.
        estimated: whether the constants come from another kind of device.
        host_needed: bytes of host memory beside a GPU, for keys and values there and for copies of modules.
        host_limit: bytes of it that can be had; None: not known, or the device is the host.
        drawer: draws `figure`; whoever makes the plan gives it.
    """

    model: str
    dtype: str
    device: str
    policy: MemoryPolicy
    workload: Workload
    limit: int
    phases: tuple[PhasePlan, ...]
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    why: str = ""
    estimated: bool = False
    host_needed: int = 0
    host_limit: int | None = None
    drawer: Callable[[Plan], Any] | None = field(default=None, compare=False)

    def __getitem__(self, phase: str) -> PhasePlan:
        found = next((one for one in self.phases if one.name == phase), None)
        if found is None:
            names = ", ".join(one.name for one in self.phases)
            raise KeyError(f"this plan has no phase {phase!r}; it has {names}")
        return found

    @property
    def largest(self) -> PhasePlan:
        """The phase that needs most: it decides."""
        return max(self.phases, key=lambda phase: phase.needed)

    @property
    def margin(self) -> int:
        """Bytes that stay free in the largest phase; negative: bytes that are missing."""
        return self.limit - self.largest.needed

    @property
    def host_missing(self) -> int:
        """Bytes of host memory that are missing; 0: it has enough, or it is not known."""
        return 0 if self.host_limit is None else max(0, self.host_needed - self.host_limit)

    @property
    def fits(self) -> bool:
        return self.margin >= 0 and not self.host_missing

    @property
    def verdict(self) -> Verdict:
        if self.fits:
            return "fits"
        return "fits with changes" if any(one.fits for one in self.alternatives) else "does not fit"

    def figure(self) -> Any:
        """The largest phase as a waterfall up to the limit; a `figures.Figure`. Needs plotly.

        Raises:
            ValueError: the plan was made without one who draws; `lab.plan` gives one.
        """
        if self.drawer is None:
            raise ValueError("this plan has no drawer: make it with lab.plan")
        return self.drawer(self)

    def __str__(self) -> str:
        return text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: bytes are ints."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "estimated": self.estimated,
            "policy": self.policy.to_dict(),
            "workload": {
                "context": self.workload.context,
                "new_tokens": self.workload.new_tokens,
                "images": self.workload.images,
                "image_size": list(self.workload.image_size),
                "audio_seconds": self.workload.audio_seconds,
                "conversations": self.workload.conversations,
                "training": None if self.workload.training is None else asdict(self.workload.training),
            },
            "limit": self.limit,
            "verdict": self.verdict,
            "margin": self.margin,
            "host_needed": self.host_needed,
            "host_limit": self.host_limit,
            "largest": self.largest.name,
            "phases": [
                {
                    "name": phase.name,
                    "nbytes": phase.nbytes,
                    "needed": phase.needed,
                    "rows": [
                        {
                            "name": row.name,
                            "kind": row.kind,
                            "nbytes": row.nbytes,
                            "counts": row.counts,
                            "spare": row.spare,
                        }
                        for row in phase.rows
                    ],
                }
                for phase in self.phases
            ],
            "alternatives": [
                {
                    "change": one.change,
                    "costs": one.costs,
                    "lossy": one.lossy,
                    "nbytes": one.nbytes,
                    "frees": one.frees,
                    "fits": one.fits,
                    "policy": one.policy.to_dict(),
                }
                for one in self.alternatives
            ],
            "notes": list(self.notes),
            "why": self.why,
        }
