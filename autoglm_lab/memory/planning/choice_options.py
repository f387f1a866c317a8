"""The settings that ``policy="auto"`` chooses among, in the order in which it gives them up; see `plan_choice`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from autoglm_lab.costs import costs
from autoglm_lab.memory.planning.planner import Planner
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.image_tokens import limited_tokens
from autoglm_lab.models.precision import MIXED
from autoglm_lab.policy import MemoryPolicy

_LEAST_KEPT = 1024
_LEAST_IMAGE = 256
"""Fewest tokens of an image that are chosen unasked: less of a phone's screen can hardly be read."""
_CHUNKS = (1024, 512, 256)
_KV = {"model": (), "int8": ("KV in int8",), "int4": ("KV in int4",)}
_WEIGHTS: tuple[tuple[Mapping[str, str], tuple[str, ...]], ...] = (
    (MIXED["int8"], ("text and head in int8",)),
    ({**MIXED["int8"], "vision": "int8"}, ("all weights in int8",)),
    (MIXED["int4"], ("text in int4, head in int8",)),
    ({**MIXED["int4"], "vision": "int8"}, ("text in int4, head in int8", "vision in int8")),
    ({**MIXED["int4"], "vision": "int4"}, ("text in int4, head in int8", "vision in int4")),
)
"""Ways to round, and the settings of `costs.costs` whose divergences add up to what each changes."""


def loss(measured: Sequence[str]) -> float:
    """By how much these settings change the next token: the sum of their divergences, in nats a token."""
    settings = costs()["settings"]
    return float(sum(settings[name]["divergence"] for name in measured))


@dataclass(frozen=True)
class Option:
    """One value of a setting.

    Attributes:
        settings: as `MemoryPolicy.replace` takes them; empty: the policy's own value.
        written: as a person writes it.
        costs: in speed or quality, in a sentence.
        slower: how much it slows down; the sum of a combination decides, so one of a later kind outweighs all before.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    written: str = ""
    costs: str = ""
    slower: int = 0


Way = tuple[Option, ...]


def qualities(planner: Planner, policy: MemoryPolicy, workload: Workload, *, rounded: bool) -> list[list[Way]]:
    """What costs quality, best first: all that the workload keeps, then its images in fewer tokens, then half of it, a
    quarter …, a list for each.

    Args:
        rounded: weights in fewer bits are among it.
    """
    exact = [(Option(), 0.0)]
    weights = [*exact, *_weights(planner, policy)] if rounded else exact
    both = sorted(product(weights, _precisions(policy)), key=lambda pair: pair[0][1] + pair[1][1])
    kept = product(_windows(planner, policy, workload), _images(planner, policy, workload))
    return [[(window, images, weight, kv) for (weight, _), (kv, _) in both] for window, images in kept]


def _weights(planner: Planner, policy: MemoryPolicy) -> Iterator[tuple[Option, float]]:
    seen: list[dict[str, str]] = []
    for precisions, measured in _WEIGHTS:
        asked = {name: one for name, one in precisions.items() if name in planner.modules}
        settings = {"modules": {name: {"precision": one} for name, one in asked.items()}}
        if asked in seen or asked.keys() & policy.precisions() or not planner.can_keep(policy.replace(**settings)):
            continue
        seen.append(asked)
        short = (name for name, one in MIXED.items() if asked == {key: one[key] for key in one if key in asked})
        written = f"quantize={next(short, asked)!r}"
        yield Option(settings, written, "weights are rounded (lossy)"), loss(measured)


def _precisions(policy: MemoryPolicy) -> Iterator[tuple[Option, float]]:
    order = list(_KV)
    for precision in order[order.index(policy.kv.precision) :]:
        if precision == policy.kv.precision:
            yield Option(), 0.0
            continue
        written = f"kv.precision='{precision}'"
        yield (
            Option({"kv": {"precision": precision}}, written, "keys and values are rounded (lossy)"),
            loss(_KV[precision]),
        )


def _windows(planner: Planner, policy: MemoryPolicy, workload: Workload) -> Iterator[Option]:
    yield Option()
    kept = workload.context + workload.new_tokens
    allowed = planner.kv_tokens(policy)
    whole = kept if allowed is None else min(kept, allowed)
    tokens = 1 << (whole - 1).bit_length() - 1
    while tokens >= _LEAST_KEPT:
        written = f"kv.max_tokens={tokens:,} with kv.overflow='drop-oldest-turns'"
        costs = f"turns older than {tokens:,} tokens are forgotten (lossy)"
        yield Option({"kv": {"max_tokens": tokens, "overflow": "drop-oldest-turns"}}, written, costs)
        tokens //= 2


def _images(planner: Planner, policy: MemoryPolicy, workload: Workload) -> list[Option]:
    """All that an image shows, then powers of two of tokens below that."""
    found = [Option()]
    if not workload.images or "vision" not in planner.modules:
        return found
    whole = limited_tokens(planner.processor(), workload.image_size, policy.max_image_tokens)
    tokens = 0 if whole is None else 1 << (whole - 1).bit_length() - 1
    while tokens >= _LEAST_IMAGE:
        costs = f"images are read in {tokens:,} of {whole:,} tokens: small print goes (lossy)"
        found.append(Option({"max_image_tokens": tokens}, f"max_image_tokens={tokens:,}", costs))
        tokens //= 2
    return found


def kinds(planner: Planner, policy: MemoryPolicy, workload: Workload) -> list[list[Option]]:
    """Each setting that costs speed with its values, the policy's own first."""
    kv, as_is = policy.kv, Option()
    chunks = [size for size in _CHUNKS if size < min(kv.chunk, workload.context)]
    slower = "prompts are read a little slower"
    smaller = [Option({"kv": {"chunk": size}}, f"kv.chunk={size}", slower, at) for at, size in enumerate(chunks, 1)]
    found = [[as_is, *smaller]]
    for name, asked, what in (
        ("vision", workload.images, "the first image after a pause waits for the encoder's weights"),
        ("audio", workload.audio_seconds, "the first sound after a pause waits for the encoder's weights"),
    ):
        if name in planner.modules and policy.module(name).residency == "keep":
            settings = {"modules": {name: "on-demand"}}
            found.append([as_is, Option(settings, f"modules.{name}='on-demand'", what, 8 if asked else 4)])
    if planner.device.kind == "cuda" and kv.place == "device":
        on_host = Option({"kv": {"place": "host"}}, "kv.place='host'", "long contexts decode slower", 32)
        found.append([as_is, on_host])
    return found


def frugal(found: Sequence[Sequence[Option]]) -> list[Way]:
    """Combinations of which one needs least: the last of every setting, but a smaller chunk may need more."""
    chunks, *others = found
    return [(chunk, *(kind[-1] for kind in others)) for chunk in chunks]
