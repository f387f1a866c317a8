"""Out of memory is an answer: free what the policy allows, try once more, else say what would fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from autoglm_lab.engine.conversation import Conversation
from autoglm_lab.engine.state import EngineState
from autoglm_lab.errors import OutOfMemoryError, PolicyError
from autoglm_lab.units import format_bytes

Result = TypeVar("Result")


def recovering(state: EngineState, phase: str, own: Conversation | None, run: Callable[[], Result]) -> Result:
    """Run a step; when memory runs out, free what the policy allows and run it once more.

    Args:
        own: the conversation that the step belongs to: its keys and values are not freed.

    Raises:
        OutOfMemoryError: it does not fit even so. Model and conversations are as before.
    """
    try:
        state.check_budget()
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
    # Outside of the except clause: the traceback would keep the failed step's tensors alive.
    state.event("out of memory", phase, why=f"{reason}; freeing what the policy allows")
    free_all(state, own)
    try:
        state.check_budget()
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        needed = getattr(error, "needed", None)
    had = state.tightest.headroom()
    state.event("out of memory", phase, why="gave up")
    raise OutOfMemoryError(phase, needed, had, remedies(state, own))


def free_all(state: EngineState, own: Conversation | None, why: str = "memory ran out") -> None:
    """Free idle conversations' KV, what is kept between turns and idle on-demand modules; then give the cache back."""
    for conversation in state.conversations.idle_by_age():
        if conversation is not own:
            evict(state, conversation, why)
    state.free_stores()
    for name, module in state.residency.items():
        on_demand = state.policy.module(name).residency == "on-demand"
        if on_demand and module.place == "device" and name not in state.in_use:
            module.park(state.policy.module(name).park_to, why)
    state.residency.settle()
    state.reclaim(why)


def fit_budget(state: EngineState) -> None:
    """Bring what the process holds under the policy's budget, by what the policy allows to free.

    Raises:
        PolicyError: it holds more even so. What was freed stays free; it comes back when it is needed.
    """
    budget = state.policy.budget
    if budget is None or state.tightest.headroom() >= 0:
        return
    free_all(state, None, "the budget is smaller")
    accelerator = state.tightest
    held = accelerator.reading().process
    if held is None or held <= budget:
        return
    here = state.accelerators.index(accelerator)
    infos = [module.info() for module in state.residency.values() if module.card == here]
    weights = [f"{info.name} {format_bytes(info.nbytes)}" for info in infos if info.place == "device"]
    context = accelerator.context + accelerator.grown.nbytes
    parts = ", ".join([f"context {format_bytes(context)}", *weights])
    raise PolicyError(
        f"a budget of {format_bytes(budget)} is less than what the process must hold with these settings, "
        f"{format_bytes(held)} ({parts}): set a larger one, or keep fewer modules on the device in the same change"
    )


def evict(state: EngineState, conversation: Conversation, why: str) -> None:
    """Drop a conversation's keys and values; what was said stays, and is read again at its next turn."""
    nbytes = conversation.kv.nbytes
    conversation.kv.clear()
    state.event("evicted", f"KV of '{conversation.name}'", nbytes=nbytes, why=why)


def remedies(state: EngineState, own: Conversation | None) -> list[str]:
    """Settings that would free memory, most effective first."""
    found: list[tuple[int, str]] = []
    for name, module in state.residency.items():
        info = module.info()
        if info.place == "device" and state.policy.module(name).residency == "keep" and name in ("vision", "audio"):
            setting = f"modules.{name}.residency='on-demand' frees {format_bytes(info.nbytes)} between requests"
            found.append((info.nbytes, setting))
    if own is not None and own.kv.nbytes and state.policy.kv.max_tokens is None:
        found.append((own.kv.nbytes, "kv.max_tokens with kv.overflow='drop-oldest-turns' bounds this conversation"))
    if state.policy.budget is not None:
        found.append((0, f"a budget above {format_bytes(state.policy.budget)}"))
    return [text for _, text in sorted(found, reverse=True)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the allocator, on the device or the host, or the policy's budget said no."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
