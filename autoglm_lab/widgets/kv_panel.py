"""The KV cache: its limits, how exactly and where it is kept, what stays between turns, and the conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from autoglm_lab.engine.service_load import ServiceLoad
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, Precision
from autoglm_lab.policy import KvPolicy
from autoglm_lab.units import exact_bytes
from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.settings import set_policy
from autoglm_lab.widgets.snapshot import Snapshot

PRECISIONS: Final[tuple[Precision, ...]] = ("model", "int8", "int4")
_SIZES = ("max_bytes", "prefix_bytes", "prefix_host_bytes", "encoder_bytes")


def kv_state(snapshot: Snapshot) -> dict[str, Any]:
    """The KV settings, what each precision takes, what is kept now, and one entry a conversation.

    Sizes that can be edited come as text that says them exactly, such as ``256MiB``; everything else is in bytes.
    """
    kv, context, ledger = snapshot.policy.kv, snapshot.capabilities.context_tokens, snapshot.ledger
    settings = kv.model_dump(exclude=set(_SIZES))
    sizes = {name: None if (size := getattr(kv, name)) is None else str(exact_bytes(size)) for name in _SIZES}
    return (
        settings
        | sizes
        | {
            "limit": token_limit(kv, snapshot.page_bytes),
            "context": context,
            "steps": limit_steps(context),
            "token_bytes": token_bytes(snapshot),
            "prefixes_now": ledger.nbytes("KV kept prefixes"),
            "prefixes_host_now": ledger.nbytes("KV kept prefixes", "host"),
            "encoders_now": ledger.nbytes("encoder outputs"),
            "conversations": [asdict(conversation) for conversation in snapshot.conversations],
            "control": snapshot.capabilities.memory_control,
            "paged": snapshot.pages is not None,
            "gpu": snapshot.on_gpu,
            "max_image_tokens": snapshot.policy.max_image_tokens,
            "images": "image" in snapshot.capabilities.modalities,
        }
    )


def token_limit(kv: KvPolicy, page_bytes: int) -> int | None:
    """Most tokens of one conversation under both limits; None: as many as the model takes."""
    limits = [] if kv.max_tokens is None else [kv.max_tokens]
    if kv.max_bytes is not None and page_bytes:
        limits.append(kv.max_bytes // page_bytes * PAGE_TOKENS)
    return min(limits, default=None)


def token_bytes(snapshot: Snapshot) -> dict[Precision, float]:
    """Bytes of one token's keys and values by precision; where pages do not tell, what the conversations take.

    That of the pages in use is what the ledger counts, rounding included.
    """
    pages = snapshot.pages
    if pages is not None:
        rounded = {pages.precision: snapshot.page_bytes / PAGE_TOKENS}
        return {name: pages.at(name).nbytes / PAGE_TOKENS for name in PRECISIONS} | rounded
    tokens = sum(conversation.tokens for conversation in snapshot.conversations)
    nbytes = sum(conversation.kv_bytes or 0 for conversation in snapshot.conversations)
    return {"model": nbytes / tokens} if tokens and nbytes else {}


def limit_steps(context: int | None) -> list[int]:
    """Powers of two from 64 tokens up to the model's context; the browser adds "no limit" after them."""
    most = context or 131072
    steps, step = [], 64
    while step < most:
        steps.append(step)
        step *= 2
    return steps


def load_facts(load: ServiceLoad | None) -> list[list[Any]]:
    """What a server's metrics tell of its KV cache and its requests: labels with what to fill in."""
    if load is None:
        return []
    told: list[tuple[str, str, Any]] = [
        ("load kv", "share", None if load.kv_share is None else f"{100 * load.kv_share:.0f}"),
        ("load capacity", "n", None if load.kv_capacity is None else f"{load.kv_capacity:,}"),
        ("load running", "n", load.running),
        ("load waiting", "n", load.waiting),
        ("load hits", "share", None if load.prefix_hits is None else f"{100 * load.prefix_hits:.0f}"),
    ]
    return [[label, {name: str(value)}] for label, name, value in told if value is not None]


class KvPanel(Panel):
    """Settings of `KvPolicy` and the conversations, each of which can be dropped."""

    name = "kv_panel"
    of_memory = True

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        return kv_state(snapshot)

    def absent_of(self, snapshot: Snapshot) -> dict[str, Any]:
        return super().absent_of(snapshot) | {"facts": load_facts(snapshot.load)}

    def do_set(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Change one setting of the policy's ``kv`` part."""
        if self.host is not None:
            bench, setting, value = self.host.bench, str(content["setting"]), content["value"]
            self.run(setting, lambda: set_policy(bench, kv={setting: value}))

    def do_image_tokens(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Let an image take at most so many tokens; no value: as many as the model's processor has it."""
        if self.host is not None:
            bench, value = self.host.bench, content["value"]
            self.run("max_image_tokens", lambda: set_policy(bench, max_image_tokens=value))

    def do_drop(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        if self.host is not None:
            engine, name = self.host.bench.engine, str(content["conversation"])
            self.run(f"drop {name}", lambda: engine.drop(name))
