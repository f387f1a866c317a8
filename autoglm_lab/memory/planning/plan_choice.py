"""The policy that fits best: what ``policy="auto"`` means.

Every combination of the settings that cost something is put in an order, and the first that fits is taken:

1. quality: the whole workload kept before a part of it; then keys and values as the model computes them before int8
   before int4;
2. speed: a smaller chunk of the prompt costs least, then an encoder on demand that the workload does not need, then one
   that it needs, then keys and values on the host, and most of all layers on the host: as few as it takes;
3. headroom: what is left goes to the conversations, as the most tokens that each may grow to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.plan_search import host_bytes
from autoglm_lab.memory.planning.planner import Planner
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.precision import MIXED
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import format_bytes

SPARE = 0.01
"""Share of the limit that a choice leaves free: as much as a plan may be under what is measured."""

_LEAST_KEPT = 1024
_CHUNKS = (1024, 512, 256)
_PRECISIONS = ("model", "int8", "int4")
# No model takes more; a plan cuts it to what this one takes.
_MOST_TOKENS = 1 << 22
_STEP = 256
_ROUND = 10 << 20
_ALL = 1 << 60


@dataclass(frozen=True)
class Choice:
    """A policy that was chosen.

    Attributes:
        policy: the best that fits; where nothing does, the one that needs least.
        plan: what it needs.
        why: why this one, in two lines; where nothing fits, by how much and which single change would.
    """

    policy: MemoryPolicy
    plan: Plan
    why: str

    @property
    def fits(self) -> bool:
        """Whether it fits with `SPARE` of the limit left."""
        return _fits(self.plan)


@dataclass(frozen=True)
class _Option:
    """One value of a setting.

    Attributes:
        slower: how much it slows down; the sum of a combination decides, so one of a later kind outweighs all before.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    written: str = ""
    costs: str = ""
    slower: int = 0


_Way = tuple[_Option, ...]


def choose(planner: Planner, policy: MemoryPolicy, workload: Workload) -> Choice:
    """The best policy for ``workload`` under the limit of ``policy`` and the device.

    Args:
        planner: of the model and the device.
        policy: its budget is the limit, and what is not searched (generation, reclaim …) stays as it is there.
    """
    plain = planner.plan(policy, workload, search=False)
    kinds = _kinds(planner, policy, workload)
    ways = sorted(product(*kinds), key=lambda way: sum(option.slower for option in way))
    frugal, qualities = _frugal(kinds), list(_qualities(planner, policy, workload))

    everything = _everything(planner, policy)

    def least(qualities: Iterable[_Option], workload: Workload) -> Plan:
        plans = [_of(planner, policy, (quality, *way, everything), workload) for quality in qualities for way in frugal]
        return min(plans, key=_leanness)

    if not _fits(least(qualities[-len(_PRECISIONS) :], workload)):
        leanest = min((least([quality], workload) for quality in qualities), key=_leanness)
        smaller = (told for told, less in _smaller(workload) if _fits(least(qualities[:1], less)))
        return _none(leanest, next(smaller, None))
    for quality in qualities:
        if not _fits(least([quality], workload)):
            continue
        for way in ways:
            plan = _of(planner, policy, (quality, *way), workload)
            if _fits(plan):
                return _chosen(planner, plan, (quality, *way), plain)
        found = _with_layers_on_host(planner, policy, workload, quality, frugal)
        if found is not None:
            return _chosen(planner, *found, plain, _faster(planner, policy, workload, quality, frugal))
    raise AssertionError("the leanest policy fits and is one of those that were tried")


def _everything(planner: Planner, policy: MemoryPolicy) -> _Option:
    """All of the layers on the host."""
    if planner.device.kind == "cpu":
        return _Option()
    return _Option({"placement": {"host_bytes": max(policy.placement.host_bytes, _ALL)}})


def _with_layers_on_host(
    planner: Planner, policy: MemoryPolicy, workload: Workload, quality: _Option, frugal: Sequence[_Way]
) -> tuple[Plan, _Way] | None:
    """The combination with which the fewest bytes pass the bus for every token; None: none fits.

    Keys and values stay where they are: on the host they would pass the bus as well.
    """
    found: list[tuple[int, Plan, _Way]] = []
    for one in frugal:
        way = tuple(option for option in one if "place" not in option.settings.get("kv", {}))
        tried = policy
        for option in (quality, *way):
            tried = tried.replace(**option.settings)
        asked = host_bytes(planner, tried, workload, spare=SPARE)
        if asked is None:
            continue
        plan = planner.plan(tried.replace(placement={"host_bytes": asked}), workload, search=False)
        written, passing = f"placement.host_bytes={format_bytes(asked)}", planner.passing(plan.policy)
        costs = f"{format_bytes(passing)} of the layers come from the host for every token, which is slow"
        found.append((passing, plan, (quality, *way, _Option({"placement": {}}, written, costs))))
    if not found:
        return None
    _, plan, chosen = min(found, key=lambda one: one[0])
    return plan, chosen


def _faster(
    planner: Planner, policy: MemoryPolicy, workload: Workload, quality: _Option, frugal: Sequence[_Way]
) -> str:
    """What would do without layers on the host, for who takes rounded weights."""
    for name, precisions in MIXED.items():
        modules = {module: {"precision": one} for module, one in precisions.items() if module in planner.modules}
        rounded = policy.replace(modules=modules)
        if not planner.can_keep(rounded):
            continue
        if any(_fits(_of(planner, rounded, (quality, *way), workload)) for way in frugal):
            return f" Faster, but lossy: quantize={name!r} needs no layers on the host."
    return ""


def _chosen(planner: Planner, plan: Plan, options: Iterable[_Option], plain: Plan, faster: str = "") -> Choice:
    used = [option for option in options if option.settings]
    bound = _bound(planner, plan)
    if bound is not None:
        plan = planner.plan(plan.policy.replace(kv={"max_tokens": bound}), plan.workload, search=False)
    what = " and ".join(option.written for option in used) or "the settings as they are"
    grow = "" if bound is None else f"; kv.max_tokens={bound:,} is what a conversation may grow to"
    first = (
        f"Chosen: {what}: {format_bytes(plan.largest.needed)} in {plan.largest.name} of {format_bytes(plan.limit)}, "
        f"{format_bytes(plan.margin)} to spare{grow}."
    )
    if not used:
        second = "Nothing is given up: answers are exact, every module stays on the device."
    else:
        missing = _missing(plain)
        cost = "; ".join(option.costs for option in used)
        second = (
            f"Nothing that costs less fits: without it {format_bytes(missing)} are missing. It costs: {cost}.{faster}"
        )
    return _told(plan, first, second)


def _none(leanest: Plan, smaller: str | None) -> Choice:
    largest = leanest.largest
    first = (
        f"No policy fits {format_bytes(leanest.limit)} with {SPARE:.0%} to spare: the leanest needs "
        f"{format_bytes(largest.needed)} in {largest.name}, {format_bytes(largest.of_kind('weights'))} of it weights; "
        f"{format_bytes(_missing(leanest))} are missing."
    )
    enough = -(-round(largest.needed / (1 - SPARE)) // _ROUND) * _ROUND
    budget = f"a budget of {format_bytes(enough)}"
    second = f"One change would do: {smaller}, or {budget}." if smaller else f"One change would do: {budget}."
    return _told(leanest, first, second)


def _told(plan: Plan, first: str, second: str) -> Choice:
    why = f"{first}\n{second}"
    plan = replace(plan, why=why)
    return Choice(plan.policy, plan, why)


def _fits(plan: Plan) -> bool:
    return _missing(plan) <= 0 and not plan.host_missing


def _leanness(plan: Plan) -> tuple[int, int]:
    return plan.host_missing, plan.largest.needed


def _missing(plan: Plan) -> int:
    return plan.largest.needed - round(plan.limit * (1 - SPARE))


def _of(planner: Planner, policy: MemoryPolicy, way: _Way, workload: Workload) -> Plan:
    for option in way:
        if option.settings:
            policy = policy.replace(**option.settings)
    return planner.plan(policy, workload, search=False)


def _qualities(planner: Planner, policy: MemoryPolicy, workload: Workload) -> Iterator[_Option]:
    """Best first: all that the workload keeps, then half of it, a quarter …, each in every precision."""
    precisions = _PRECISIONS[_PRECISIONS.index(policy.kv.precision) :]
    kept = workload.context + workload.new_tokens
    allowed = planner.kv_tokens(policy)
    whole = kept if allowed is None else min(kept, allowed)
    windows: list[int | None] = [None]
    tokens = 1 << (whole - 1).bit_length() - 1
    while tokens >= _LEAST_KEPT:
        windows.append(tokens)
        tokens //= 2
    for window, precision in product(windows, precisions):
        kv: dict[str, Any] = {}
        written, costs = [], []
        if precision != policy.kv.precision:
            kv["precision"] = precision
            written.append(f"kv.precision='{precision}'")
            costs.append("keys and values are rounded (lossy)")
        if window is not None:
            kv |= {"max_tokens": window, "overflow": "drop-oldest-turns"}
            written.append(f"kv.max_tokens={window:,} with kv.overflow='drop-oldest-turns'")
            costs.append(f"turns older than {window:,} tokens are forgotten (lossy)")
        yield _Option({"kv": kv} if kv else {}, " and ".join(written), "; ".join(costs))


def _kinds(planner: Planner, policy: MemoryPolicy, workload: Workload) -> list[list[_Option]]:
    """Each setting that costs speed with its values, the policy's own first."""
    kv, as_is = policy.kv, _Option()
    chunks = [size for size in _CHUNKS if size < min(kv.chunk, workload.context)]
    slower = "prompts are read a little slower"
    smaller = [_Option({"kv": {"chunk": size}}, f"kv.chunk={size}", slower, at) for at, size in enumerate(chunks, 1)]
    kinds = [[as_is, *smaller]]
    for name, asked, what in (
        ("vision", workload.images, "the first image after a pause waits for the encoder's weights"),
        ("audio", workload.audio_seconds, "the first sound after a pause waits for the encoder's weights"),
    ):
        if name in planner.modules and policy.module(name).residency == "keep":
            settings = {"modules": {name: "on-demand"}}
            kinds.append([as_is, _Option(settings, f"modules.{name}='on-demand'", what, 8 if asked else 4)])
    if planner.device.kind == "cuda" and kv.place == "device":
        on_host = _Option({"kv": {"place": "host"}}, "kv.place='host'", "long contexts decode slower", 32)
        kinds.append([as_is, on_host])
    return kinds


def _frugal(kinds: Sequence[Sequence[_Option]]) -> list[_Way]:
    """Combinations of which one needs least: the last of every setting, but a smaller chunk may need more."""
    chunks, *others = kinds
    return [(chunk, *(kind[-1] for kind in others)) for chunk in chunks]


def _bound(planner: Planner, plan: Plan) -> int | None:
    """The most tokens that a conversation may grow to; None: the policy says it, or the model's whole context fits."""
    work = plan.workload

    def fit(kept: int) -> bool:
        grown = replace(work, context=kept - work.new_tokens)
        return _fits(planner.plan(plan.policy, grown, search=False))

    if planner.kv_tokens(plan.policy) is not None or fit(_MOST_TOKENS):
        return None
    low, high = work.context + work.new_tokens, _MOST_TOKENS
    while high - low > _STEP:
        middle = (low + high) // 2 // _STEP * _STEP
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def _smaller(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """What one could ask for instead. A shorter prompt would not help: forgetting old turns was tried."""
    if workload.conversations > 1:
        yield "one conversation", replace(workload, conversations=1)
    if workload.images:
        yield "no image", replace(workload, images=0)
