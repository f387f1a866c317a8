"""Policies that need less than one that does not fit: single changes first, then pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from autoglm_lab.memory.planning.plan import Alternative, Plan
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.image_tokens import limited_tokens
from autoglm_lab.models.precision import MIXED
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import format_bytes

if TYPE_CHECKING:
    from autoglm_lab.memory.planning.planner import Planner


@dataclass(frozen=True)
class Change:
    """One setting that frees memory.

    Attributes:
        settings: as `MemoryPolicy.replace` takes them.
        written: as a person writes it.
        rank: how much it costs: 0 nothing that one notices, 1 speed, 2 what it can do, 3 quality.
    """

    settings: dict[str, Any]
    written: str
    costs: str
    rank: int

    @property
    def lossy(self) -> bool:
        return self.rank == 3


def alternatives(planner: Planner, plan: Plan) -> tuple[Alternative, ...]:
    """Policies that need less than ``plan``: those that fit first, the cheapest and mildest of them before the others.

    Pairs are looked at only where no single change fits, and only those that free more than either of their changes.
    """
    tried = [(change, *_tried(planner, plan, (change,))) for change in changes(planner, plan.policy, plan.workload)]
    useful = [entry for entry in tried if entry[1].frees > 0 or entry[1].fits]
    found = [(one, rank) for _, one, rank in useful]
    if not any(one.fits for one, _ in found):
        for (change, one, _), (other_change, other, _) in combinations(useful, 2):
            if _touch_the_same(change, other_change):
                continue
            both, rank = _tried(planner, plan, (change, other_change))
            if both.frees > max(one.frees, other.frees):
                found.append((both, rank))
    found.sort(key=lambda entry: (0, entry[1], entry[0].frees) if entry[0].fits else (1, entry[0].nbytes, entry[1]))
    return tuple(one for one, _ in found)


def _tried(planner: Planner, plan: Plan, chosen: tuple[Change, ...]) -> tuple[Alternative, int]:
    policy = plan.policy
    for change in chosen:
        policy = policy.replace(**change.settings)
    other = planner.plan(policy, plan.workload, search=False)
    nbytes = other.largest.needed
    return Alternative(
        policy=policy,
        change=" and ".join(change.written for change in chosen),
        costs="; ".join(change.costs for change in chosen),
        lossy=any(change.lossy for change in chosen),
        nbytes=nbytes,
        frees=plan.largest.needed - nbytes,
        fits=other.fits,
        reload=(policy.placement, policy.precisions()) != (plan.policy.placement, plan.policy.precisions()),
    ), sum(4**change.rank for change in chosen)


def changes(planner: Planner, policy: MemoryPolicy, workload: Workload) -> Iterator[Change]:
    """Single settings that could free memory for ``workload``."""
    if workload.training is not None:
        yield from _of_training(policy)
        return
    yield from _of_modules(planner, policy, workload)
    yield from _of_layers(planner, policy, workload)
    yield from _of_steps(planner, policy, workload)
    yield from _of_kept(planner, policy, workload)


def _of_training(policy: MemoryPolicy) -> Iterator[Change]:
    """As training itself goes on when memory runs out, and a smaller optimiser."""
    training = policy.training
    if training.checkpointing not in ("auto", "every-layer"):
        settings: dict[str, Any] = {"training": {"checkpointing": "every-layer"}}
        yield _setting(settings, "training.checkpointing='every-layer'", "layers are computed twice", 1)
    if training.micro_batch > 1:
        settings = {"training": {"micro_batch": 1, "accumulation": training.accumulation * training.micro_batch}}
        yield _setting(settings, "training.micro_batch=1", "each dialogue by itself", 1)
    if training.offload < 1:
        yield _setting({"training": {"offload": 1.0}}, "training.offload=1.0", "activations pass the bus", 1)
    if training.optimizer == "adamw":
        settings = {"training": {"optimizer": "adamw-8bit"}}
        yield _setting(settings, "training.optimizer='adamw-8bit'", "the optimiser's states are rounded (lossy)", 3)


def _of_modules(planner: Planner, policy: MemoryPolicy, workload: Workload) -> Iterator[Change]:
    for name in ("vision", "audio"):
        if name not in planner.modules or policy.module(name).residency != "keep":
            continue
        asked = workload.images if name == "vision" else workload.audio_seconds
        what = "an image" if name == "vision" else "a sound"
        yield _setting(
            {"modules": {name: "on-demand"}}, f"modules.{name}='on-demand'", f"{what} waits for its weights", 1
        )
        if not asked:
            yield _setting({"modules": {name: "off"}}, f"modules.{name}='off'", f"{what} is refused", 2)


def _of_layers(planner: Planner, policy: MemoryPolicy, workload: Workload) -> Iterator[Change]:
    """Weights in fewer bits, and as many bytes of layers on the host as are missing."""
    for name in ("int8", "int4"):
        modules = {module: one for module, one in MIXED[name].items() if module in planner.modules}
        if any(policy.module(module).precision != "model" for module in modules):
            continue
        settings = {"modules": {module: {"precision": one} for module, one in modules.items()}}
        if planner.can_keep(policy.replace(**settings)):
            yield _setting(settings, f"quantize={name!r}", "weights are rounded (lossy)", 3)
    asked = host_bytes(planner, policy, workload, spare=0.0)
    if asked is not None:
        written = f"placement.host_bytes={format_bytes(asked)}"
        yield _setting({"placement": {"host_bytes": asked}}, written, "every token waits for layers from the host", 2)


def host_bytes(planner: Planner, policy: MemoryPolicy, workload: Workload, *, spare: float) -> int | None:
    """The least ``placement.host_bytes`` with which the workload fits; None: it fits anyway, or with none.

    Args:
        spare: share of the limit that has to stay free.
    """
    if planner.device.kind == "cpu":
        return None
    asked = policy.placement.host_bytes
    for _ in range(_TRIES):
        plan = planner.plan(policy.replace(placement={"host_bytes": asked}), workload, search=False)
        missing = plan.largest.needed - round(plan.limit * (1 - spare))
        if missing <= 0:
            return asked if asked > policy.placement.host_bytes and not plan.host_missing else None
        asked = -(-(asked + missing) // _STEP) * _STEP
    return None


_STEP, _TRIES = 2 << 20, 8


def _of_steps(planner: Planner, policy: MemoryPolicy, workload: Workload) -> Iterator[Change]:
    for chunk in (1024, 512, 256):
        if chunk < min(policy.kv.chunk, workload.context):
            yield _setting({"kv": {"chunk": chunk}}, f"kv.chunk={chunk}", "prompts are read a little slower", 0)
    if policy.kv.graphs and planner.device.kind == "cuda":
        yield _setting({"kv": {"graphs": False}}, "kv.graphs=False", "decoding is several times slower", 1)
    if policy.kv.encoder_bytes:
        yield _setting({"kv": {"encoder_bytes": 0}}, "kv.encoder_bytes=0", "an image seen again is encoded again", 0)


def _of_kept(planner: Planner, policy: MemoryPolicy, workload: Workload) -> Iterator[Change]:
    if policy.kv.place == "device" and planner.device.kind == "cuda":
        yield _setting({"kv": {"place": "host"}}, "kv.place='host'", "long contexts decode slower", 1)
    if policy.kv.place == "host" and planner.device.kind == "cuda":
        yield _setting({"kv": {"place": "device"}}, "kv.place='device'", "the device holds keys and values again", 0)
    order = ("model", "int8", "int4")
    for precision in order[order.index(policy.kv.precision) + 1 :]:
        yield _setting(
            {"kv": {"precision": precision}}, f"kv.precision='{precision}'", "keys and values are rounded (lossy)", 3
        )
    yield from _of_images(planner, policy, workload)
    kept = workload.context + workload.new_tokens
    for tokens in (8192, 4096, 2048):
        if tokens < min(kept, planner.kv_tokens(policy) or kept):
            settings = {"kv": {"max_tokens": tokens, "overflow": "drop-oldest-turns"}}
            written = f"kv.max_tokens={tokens}, kv.overflow='drop-oldest-turns'"
            yield _setting(settings, written, f"turns older than {tokens:,} tokens are forgotten (lossy)", 3)


def _of_images(planner: Planner, policy: MemoryPolicy, workload: Workload) -> Iterator[Change]:
    if not workload.images or "vision" not in planner.modules:
        return
    whole = limited_tokens(planner.processor(), workload.image_size, policy.max_image_tokens) or 0
    for tokens in (2048, 1024, 512):
        if tokens < whole:
            costs = f"images are read in {tokens:,} of {whole:,} tokens (lossy)"
            yield _setting({"max_image_tokens": tokens}, f"max_image_tokens={tokens:,}", costs, 3)


def _setting(settings: dict[str, Any], written: str, costs: str, rank: int) -> Change:
    return Change(settings, written, costs, rank)


def _touch_the_same(one: Change, other: Change) -> bool:
    def names(settings: dict[str, Any]) -> set[tuple[str, str]]:
        return {
            (part, name) for part, value in settings.items() for name in (value if isinstance(value, dict) else "*")
        }

    return bool(names(one.settings) & names(other.settings))
