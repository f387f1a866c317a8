"""From one policy to another, between two steps."""

from __future__ import annotations

from collections.abc import Collection

from autoglm_lab.engine.overflow import check_overflow
from autoglm_lab.engine.parallel.limits import refuse_apart
from autoglm_lab.engine.recovery import evict, fit_budget
from autoglm_lab.engine.state import EngineState
from autoglm_lab.errors import PolicyError
from autoglm_lab.memory.allocator_setting import expand_segments
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.ledger import LedgerBook
from autoglm_lab.models.image_tokens import limit_image_tokens
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import exact_bytes


class PolicyChange:
    """Lets an engine obey another policy. Only the engine's thread calls it.

    Args:
        book: where pools of pages are registered.
    """

    def __init__(self, state: EngineState, book: LedgerBook) -> None:
        self._state, self._book = state, book
        self._old_pools: list[KvPool] = []

    def apply(self, policy: MemoryPolicy) -> None:
        """Obey ``policy``: residency, budget and stores at once, KV limits from the next turn of a conversation on.

        Raises:
            ModuleError, OutOfMemoryError, PolicyError: it cannot be kept; the policy stays as it was.
        """
        state, before = self._state, self._state.policy
        _refuse_other_precisions(policy, before)
        check_overflow(policy.kv, state.model)
        if policy.placement != before.placement:
            was, now = exact_bytes(before.placement.host_bytes), exact_bytes(policy.placement.host_bytes)
            raise PolicyError(
                f"placement.host_bytes is {was} since this model was loaded: load it again with "
                f"policy.replace(placement={{'host_bytes': {now!r}}})"
            )
        if state.ranks is not None:
            refuse_apart(policy, before)
        if len(state.accelerators) > 1 and policy.kv.place == "host":
            raise PolicyError("kv.place='host' is for one device: on several, keys and values lie beside their layers")
        self._keep_what_fits(policy, before)
        if state.ranks is not None and policy.budget != before.budget:
            state.ranks.set_budget(policy.budget)
        segments = policy.reclaim.expandable_segments and not before.reclaim.expandable_segments
        late = expand_segments(state.accelerator.kind) if segments else ""
        if late:
            state.event("note", "reclaim", why=late)
        kept, wanted = before.kv, policy.kv
        if (kept.precision, kept.place) != (wanted.precision, wanted.place) and state.pool is not None:
            self._change_pages(state.pool)
        elif kept.graphs != wanted.graphs:
            state.prepare_steps()
        state.limit_stores()
        if policy.budget != before.budget:
            state.event("budget", "the process" if policy.budget else "none: the whole device", nbytes=policy.budget)
        if policy.max_image_tokens != before.max_image_tokens:
            why = limit_image_tokens(state.processor, policy.max_image_tokens) or "from the next image on"
            state.event("policy", "max_image_tokens", why=why)
        for part in ("kv", "reclaim", "generation"):
            if getattr(policy, part) != getattr(before, part):
                state.event("policy", part, why="from the next turn on")

    def settle(self) -> None:
        """A turn has ended: pages of another kind that nobody holds any more are given back."""
        if self._old_pools:
            self._state.conversations.use(self._state.pool)
            self._close_old_pools()

    def _keep_what_fits(self, policy: MemoryPolicy, before: MemoryPolicy) -> None:
        state = self._state
        state.set_budget(policy.budget)
        try:
            state.residency.apply(policy)
            state.policy = policy
            fit_budget(state)
        except Exception:
            state.policy = before
            state.set_budget(before.budget)
            if state.residency.policy is not before:
                state.residency.apply(before)
            raise

    def _change_pages(self, old: KvPool) -> None:
        """Begin with pages of another kind: at once for who is idle, from its next turn on for who is answering."""
        state, kv = self._state, self._state.policy.kv
        for conversation in state.conversations.idle_by_age():
            evict(state, conversation, "the policy keeps keys and values in another way")
        old.prefixes.obey(kv.model_copy(update={"reuse": False}))
        state.pool = old.like(old.form.at(kv.precision), kv.place)
        state.conversations.use(state.pool)
        self._book.register(state.pool)
        state.prepare_steps()
        self._old_pools.append(old)
        self._close_old_pools()

    def _close_old_pools(self) -> None:
        for pool in tuple(self._old_pools):
            if not pool.used_pages:
                self._book.unregister(pool)
                pool.close()
                self._old_pools.remove(pool)


def _refuse_other_precisions(policy: MemoryPolicy, before: MemoryPolicy) -> None:
    for name in sorted({*policy.modules, *before.modules}):
        wanted, kept = policy.module(name).precision, before.module(name).precision
        if wanted != kept:
            raise PolicyError(
                f"modules.{name}.precision is {kept!r} since this model was loaded: to have it in {wanted!r}, load it "
                f"again with quantize={policy.precisions() or None!r}"
            )


def check_modules(policy: MemoryPolicy, modules: Collection[str]) -> None:
    """Raise `PolicyError` where the policy names a module that is not one of ``modules``."""
    unknown = [name for name in policy.modules if name not in modules]
    if unknown:
        raise PolicyError(f"this model has no module '{unknown[0]}'; its modules are {', '.join(modules)}")
