"""What one turn needs beyond what is held, what can be had for it, and which settings would let it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from autoglm_lab.engine.state import EngineState
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS
from autoglm_lab.memory.planning.encoder_tapes import MediumInputs
from autoglm_lab.memory.planning.plan_search import changes
from autoglm_lab.memory.planning.planner import Planner
from autoglm_lab.memory.planning.step_work import Peak, RequestCost, UntracedError
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import MiB, format_bytes

_SHOWN = 4
_ROUND = 10 * MiB


@dataclass(frozen=True)
class Request:
    """One turn as the plan is asked about it. Bytes and tokens.

    Attributes:
        prompt: tokens of the prompt, those included that need no reading.
        kept: most tokens in the cache at the end.
        chunks: the spans of the prompt that are read.
        batch: conversations that answer together, this one included.
        held: bytes of its conversation's keys and values now.
        needs: the encoders that it needs.
        media: what is encoded for it.
        promised: bytes of keys and values that other turns under way will still take.
    """

    conversation: str
    prompt: int
    kept: int
    chunks: tuple[tuple[int, int], ...]
    batch: int = 1
    held: int = 0
    needs: frozenset[str] = frozenset()
    media: tuple[MediumInputs, ...] = ()
    promised: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a turn needs beyond what the process holds. Bytes.

    Attributes:
        adds: by phase, what comes on top of what is held.
        had: what can be had: free within the budget, and what the policy lets the engine free.
        peaks: by phase, the most that the process will hold; empty where the machine hides what it holds.
        others: whether other turns are under way.
    """

    adds: dict[str, int]
    had: int
    peaks: dict[str, int] = field(default_factory=dict)
    others: bool = False

    @property
    def phase(self) -> str:
        """The one that adds most."""
        return max(self.adds, key=lambda phase: self.adds[phase])

    @property
    def needed(self) -> int:
        return self.adds[self.phase]

    @property
    def missing(self) -> int:
        """Bytes that cannot be had; negative: that stay free."""
        return self.needed - self.had


def estimate(state: EngineState, request: Request, cost: RequestCost, driver: int) -> Estimate:
    """What a turn needs with the memory as it is now. Costs one reading of the device.

    Args:
        driver: what the driver takes beside its context once every phase was gone through.
    """
    reading = state.accelerator.reading()
    graphs = _graphs_held(state)
    # What the allocator keeps unused is taken first; what captured steps work in is theirs.
    slack = max(0, (reading.reserved or 0) - (reading.allocated or 0) - graphs)
    work, pool = cost.work, state.pool
    idle = 0 if pool is None or pool.place == "host" else max(0, pool.backed - pool.used_pages * pool.page_bytes)
    read, kv = (
        max(0, max(0, nbytes + work.own_cache - request.held) + request.promised - idle)
        for nbytes in (cost.read, cost.kv)
    )
    growth = max(0, driver - state.accelerator.grown.nbytes)
    weights = sum(module.nbytes for name, module in state.residency.items() if _comes(state, name, request))

    def on_top(peak: Peak, more: int = 0) -> int:
        return max(0, peak.reserved + more - slack)

    adds = {"load": weights}
    if work.encode is not None:
        adds["encode"] = weights + growth + on_top(work.encode)
    adds["prefill"] = weights + growth + read + on_top(work.prefill, work.features)
    stays = min(work.features, state.policy.kv.encoder_bytes)
    adds["decode"] = weights + growth + kv + on_top(work.decode, stays + max(0, work.graphs - graphs))
    held = reading.process
    return Estimate(
        adds=adds,
        had=max(0, state.accelerator.headroom()) + _freeable(state, request),
        peaks={} if held is None else {phase: held + nbytes for phase, nbytes in adds.items()},
        others=request.batch > 1,
    )


def remedies(
    state: EngineState,
    planner: Planner,
    request: Request,
    found: Estimate,
    cost: Callable[[MemoryPolicy], RequestCost],
) -> list[str]:
    """What would let a turn fit that does not, mildest first. Records nothing.

    Args:
        cost: of the turn under another policy; it may raise `UntracedError`, and then that policy is left out.
    """
    told: list[str] = []
    missing, policy = found.missing, state.policy
    answer = request.kept - request.prompt
    page = 0 if state.pool is None or state.pool.place == "host" else state.pool.page_bytes
    if page and found.phase == "decode":
        fewer = (-(-missing // page) + 1) * PAGE_TOKENS
        if fewer < answer:
            told.append(f"an answer of at most {answer - fewer:,} tokens (max_new_tokens)")
    if request.promised >= missing > 0 and request.promised:
        told.append("the same when the other answers are over")
    workload = Workload(max(1, request.prompt), max(1, answer), images=int("vision" in request.needs))
    options = []
    for change in changes(planner, policy, workload):
        other = policy.replace(**change.settings)
        try:
            less = estimate(state, request, cost(other), planner.device.working).needed
        except UntracedError:
            continue
        off = [name for name in other.modules if other.module(name).residency != policy.module(name).residency]
        freed = sum(state.residency[name].nbytes for name in off if _could_go(state, name, request))
        if less - found.had - freed <= 0:
            options.append((change.rank, f"{change.written} ({change.costs})"))
    told += [text for _, text in sorted(options)[:_SHOWN]]
    if policy.budget is not None:
        enough = -(-(policy.budget + missing) // _ROUND) * _ROUND
        told += [f"a budget of {format_bytes(enough)}"] * (enough <= state.accelerator.total)
    return told


def _graphs_held(state: EngineState) -> int:
    graphs = state.stepper.graphs
    rows = () if graphs is None else graphs.holdings()
    return sum(row.nbytes or 0 for row in rows if row.name == "decode graphs")


def _comes(state: EngineState, name: str, request: Request) -> bool:
    needed = name in request.needs if name in ("vision", "audio") else True
    return needed and state.residency[name].at != "device"


def _could_go(state: EngineState, name: str, request: Request) -> bool:
    return state.residency[name].at == "device" and name not in request.needs and name not in state.in_use


def _freeable(state: EngineState, request: Request) -> int:
    """Bytes that the engine frees where memory runs out; see `recovery.free_all`."""
    nbytes = state.features.nbytes
    if state.pool is None or state.pool.place == "device":
        idle = [one for one in state.conversations.idle_by_age() if one.name != request.conversation]
        nbytes += sum(one.kv.own_nbytes for one in idle)
        nbytes += 0 if state.pool is None else state.pool.prefixes.nbytes
    for name, module in state.residency.items():
        if state.policy.module(name).residency == "on-demand" and _could_go(state, name, request):
            nbytes += module.nbytes
    return nbytes
