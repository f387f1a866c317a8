"""The KV cache: its limit, what happens there, and the conversations in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.settings import set_policy
from autoglm_lab.widgets.snapshot import Snapshot


def kv_state(snapshot: Snapshot) -> dict[str, Any]:
    """The KV settings, the steps of the slider in tokens, and one entry a conversation."""
    kv, context = snapshot.policy.kv, snapshot.capabilities.context_tokens
    tokens = sum(conversation.tokens for conversation in snapshot.conversations)
    nbytes = sum(conversation.kv_bytes for conversation in snapshot.conversations)
    return {
        "max_tokens": kv.max_tokens,
        "context": context,
        "steps": limit_steps(context),
        "overflow": kv.overflow,
        "reuse": kv.reuse,
        "max_conversations": kv.max_conversations,
        "token_bytes": nbytes / tokens if tokens and nbytes else None,
        "conversations": [asdict(conversation) for conversation in snapshot.conversations],
        "control": snapshot.capabilities.memory_control,
    }


def limit_steps(context: int | None) -> list[int]:
    """Powers of two from 64 tokens up to the model's context; the browser adds "no limit" after them."""
    most = context or 131072
    steps, step = [], 64
    while step < most:
        steps.append(step)
        step *= 2
    return steps


class KvPanel(Panel):
    """Settings of `KvPolicy` and the conversations, each of which can be dropped."""

    name = "kv_panel"

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        return kv_state(snapshot)

    def do_set(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Change one setting of the policy's ``kv`` part."""
        if self.host is not None:
            bench, setting, value = self.host.bench, str(content["setting"]), content["value"]
            self.run(setting, lambda: set_policy(bench, kv={setting: value}))

    def do_drop(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        if self.host is not None:
            engine, name = self.host.bench.engine, str(content["conversation"])
            self.run(f"drop {name}", lambda: engine.drop(name))
