"""Conversations: what was said, and the keys and values kept of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.messages import Message
from autoglm_lab.engine.protocol import ConversationInfo
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.ledger import Row


@dataclass
class Conversation:
    """One dialogue. ``messages`` holds finished turns only; ``kv`` may hold less, never something else."""

    name: str
    kv: KvState
    messages: tuple[Message, ...] = ()
    last_used: float = 0.0
    busy: bool = False
    reused_share: float | None = None

    def info(self) -> ConversationInfo:
        return ConversationInfo(
            name=self.name,
            turns=sum(message.role == "user" for message in self.messages),
            tokens=len(self.kv.ids),
            kv_bytes=self.kv.nbytes,
            busy=self.busy,
            reused_share=self.reused_share,
        )


class Conversations:
    """Every conversation of one engine, and their rows in the ledger."""

    def __init__(self, pool: KvPool | None) -> None:
        self._pool = pool
        self._by_name: dict[str, Conversation] = {}

    def get(self, name: str) -> Conversation:
        """The conversation of this name, begun if it is new."""
        conversation = self._by_name.get(name) or Conversation(name, KvState(self._pool))
        self._by_name[name] = conversation
        conversation.last_used = time.monotonic()
        return conversation

    def use(self, pool: KvPool | None) -> None:
        """Keep keys and values in this pool from now on; who has a turn under way, from its next turn on."""
        self._pool = pool
        for one in self:
            other = one.kv.paged is not None and one.kv.paged.pool is not pool
            if other and not one.busy:
                one.kv.clear()
                one.kv = KvState(pool)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(tuple(self._by_name.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def drop(self, name: str) -> int:
        """Forget a conversation. Returns the bytes of its keys and values."""
        conversation = self._by_name.pop(name)
        nbytes = conversation.kv.nbytes
        conversation.kv.clear()
        return nbytes

    def idle_by_age(self) -> list[Conversation]:
        """Conversations that hold keys and values and have no turn under way, least recently used first."""
        idle = [one for one in tuple(self._by_name.values()) if one.kv.nbytes and not one.busy]
        return sorted(idle, key=lambda one: one.last_used)

    def infos(self) -> tuple[ConversationInfo, ...]:
        return tuple(one.info() for one in tuple(self._by_name.values()))

    def holdings(self) -> Iterable[Row]:
        for one in tuple(self._by_name.values()):
            counts = f"keys and values of {len(one.kv.ids):,} tokens of conversation '{one.name}'"
            if one.kv.paged is None:  # a cache of transformers' own lies in tensors
                yield Row(f"KV {one.name}", "kv", "device", one.kv.own_nbytes, counts, within="allocator")
                continue
            pool = one.kv.paged.pool
            for card, nbytes in pool.parted(one.kv.paged.own_pages):
                yield Row(f"KV {one.name}", "kv", pool.place, nbytes, counts, card=card)
