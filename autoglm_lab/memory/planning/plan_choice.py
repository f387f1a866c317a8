"""The policy that fits best: what ``policy="auto"`` means.

Every combination of the settings that cost something is put in an order, and the first that fits is taken:

1. quality: the whole workload kept before a part of it, its images as they are before fewer tokens of them; then keys
   and values (and weights, where they may be rounded: ``quantize="auto"``) as the model has them before those that
   change its answers least, as measured;
2. speed: a smaller chunk of the prompt costs least, then an encoder on demand that the workload does not need, then one
   that it needs, then keys and values on the host, and most of all layers on the host: as few as it takes;
3. headroom: what is left goes to the conversations, as the most tokens that each may grow to.

So layers on the host, which are exact, come before rounded weights, which are faster: the choice says which would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from autoglm_lab.memory.planning.choice_options import Option, Way, frugal, kinds, qualities
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.plan_search import host_bytes
from autoglm_lab.memory.planning.planner import Planner
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.precision import MIXED
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import format_bytes

SPARE = 0.01
"""Share of the limit that a choice leaves free: as much as a plan may be under what is measured."""

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


def choose(planner: Planner, policy: MemoryPolicy, workload: Workload, *, rounded: bool = False) -> Choice:
    """The best policy for ``workload`` under the limit of ``policy`` and the device.

    Args:
        planner: of the model and the device.
        policy: its budget is the limit, and what is not searched (generation, reclaim …) stays as it is there.
        rounded: weights may be kept in fewer bits where nothing else fits.
    """
    return _Search(planner, policy, workload, rounded=rounded).best()


class _Search:
    """The combinations of one choice, and what they need."""

    def __init__(self, planner: Planner, policy: MemoryPolicy, workload: Workload, *, rounded: bool) -> None:
        self.planner, self.policy, self.workload, self.rounded = planner, policy, workload, rounded
        speeds = kinds(planner, policy, workload)
        self.ways = sorted(product(*speeds), key=lambda way: sum(option.slower for option in way))
        self.lean = [(*way, _everything(planner, policy)) for way in frugal(speeds)]
        self.losses = qualities(planner, policy, workload, rounded=rounded)

    def best(self) -> Choice:
        planner, policy, workload = self.planner, self.policy, self.workload
        plain = planner.plan(policy, workload, search=False)
        for at, quality in enumerate(one for part in self.losses for one in part):
            if at == 1 and self.hopeless(self.losses[-1]):  # a smaller image takes a trace of its own
                return self.none()
            if self.hopeless([quality]):
                continue
            for way in self.ways:
                plan = _of(planner, policy, (*quality, *way), workload)
                if _fits(plan):
                    return _chosen(planner, plan, (*quality, *way), plain)
            found = _with_layers_on_host(planner, policy, workload, quality, self.lean)
            if found is not None:
                return _chosen(planner, *found, plain, _faster(planner, policy, workload, quality, self.lean))
        return self.none()

    def none(self) -> Choice:
        """What is told where nothing fits."""
        every = [quality for part in self.losses for quality in part]
        leanest = min(self.plans(every), key=_missing)
        if _missing(leanest) <= 0:  # the host has no room for all of that
            leanest = min(self.plans(every, on_host=False), key=_missing)
        instead = [told for told, less in _smaller(self.workload) if self.could_fit(self.losses[0][:1], less)]
        if not self.rounded:
            found = qualities(self.planner, self.policy, self.workload, rounded=True)
            if self.could_fit(found[0], self.workload):
                instead.insert(0, "rounded weights, quantize='auto' (lossy)")
        exact = self.planner.kept_in(leanest.policy.precisions())
        return _none(exact.plan(leanest.policy, self.workload, search=False), next(iter(instead), None))

    def hopeless(self, among: Iterable[Way]) -> bool:
        """Whether the device is too small for all of them, whatever the host holds."""
        return all(_missing(plan) > 0 for plan in self.plans(among))

    def could_fit(self, among: Iterable[Way], workload: Workload) -> bool:
        """Whether one of them fits, as far as plans tell that trace no rounded layers."""
        return any(_fits(plan) for on_host in (True, False) for plan in self.plans(among, workload, on_host=on_host))

    def plans(self, among: Iterable[Way], workload: Workload | None = None, *, on_host: bool = True) -> list[Plan]:
        """The leanest ways of some qualities, with all layers on the host or none."""
        found = ((*quality, *(way if on_host else way[:-1])) for quality in among for way in self.lean)
        work = workload or self.workload
        return [self.planner.plan(_under(self.policy, way), work, search=False) for way in found]


def _everything(planner: Planner, policy: MemoryPolicy) -> Option:
    """All of the layers on the host."""
    if planner.device.kind == "cpu":
        return Option()
    return Option({"placement": {"host_bytes": max(policy.placement.host_bytes, _ALL)}})


def _with_layers_on_host(
    planner: Planner, policy: MemoryPolicy, workload: Workload, quality: Way, lean: Sequence[Way]
) -> tuple[Plan, Way] | None:
    """The combination with which the fewest bytes pass the bus for every token; None: none fits.

    Keys and values stay where they are: on the host they would pass the bus as well.
    """
    found: list[tuple[int, Plan, Way]] = []
    for one in lean:
        way = (*quality, *(option for option in one[:-1] if "place" not in option.settings.get("kv", {})))
        tried = _under(policy, way)
        exact = planner.kept_in(tried.precisions())
        asked = host_bytes(exact, tried, workload, spare=SPARE)
        if asked is None:
            continue
        plan = exact.plan(tried.replace(placement={"host_bytes": asked}), workload, search=False)
        written, passing = f"placement.host_bytes={format_bytes(asked)}", planner.passing(plan.policy)
        costs = f"{format_bytes(passing)} of the layers come from the host for every token, which is slow"
        found.append((passing, plan, (*way, Option({"placement": {}}, written, costs))))
    if not found:
        return None
    _, plan, chosen = min(found, key=lambda one: one[0])
    return plan, chosen


def _faster(planner: Planner, policy: MemoryPolicy, workload: Workload, quality: Way, lean: Sequence[Way]) -> str:
    """What would do without layers on the host, for who takes rounded weights."""
    for name in ("int8", "int4"):
        modules = {module: {"precision": one} for module, one in MIXED[name].items() if module in planner.modules}
        rounded = policy.replace(modules=modules)
        if policy.precisions() or not planner.can_keep(rounded):
            continue
        policies = (_under(rounded, (*quality, *way[:-1])) for way in lean)
        if any(_fits(planner.plan(one, workload, search=False)) for one in policies):
            return f" Faster, but lossy: quantize={name!r} needs no layers on the host."
    return ""


def _chosen(planner: Planner, plan: Plan, options: Iterable[Option], plain: Plan, faster: str = "") -> Choice:
    used = [option for option in options if option.settings]
    planner = planner.kept_in(plan.policy.precisions())
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
    short = leanest.host_limit is not None and not leanest.policy.placement.host_bytes
    on_host = "" if not short else ", and the host has no room for layers"
    first = (
        f"No policy fits {format_bytes(leanest.limit)} with {SPARE:.0%} to spare{on_host}: the leanest needs "
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


def _missing(plan: Plan) -> int:
    return plan.largest.needed - round(plan.limit * (1 - SPARE))


def _under(policy: MemoryPolicy, way: Way) -> MemoryPolicy:
    for option in way:
        if option.settings:
            policy = policy.replace(**option.settings)
    return policy


def _of(planner: Planner, policy: MemoryPolicy, way: Way, workload: Workload) -> Plan:
    """The plan under a combination. Rounded layers allocate more than exact ones, and are traced where those fit."""
    policy = _under(policy, way)
    plan = planner.plan(policy, workload, search=False)
    exact = planner.kept_in(policy.precisions()) if _fits(plan) else planner
    return plan if exact is planner else exact.plan(policy, workload, search=False)


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
