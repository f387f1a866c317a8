"""A decoder layer that keeps its input alone and runs again in the backward pass: what training does, and plans."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def recomputing(
    module: nn.Module, index: int = 0, put: Callable[[int, Tensor], Callable[[], Tensor]] | None = None
) -> Callable[..., Any]:
    """A decoder layer's forward that keeps its input alone.

    Args:
        index: of the layer, for ``put``.
        put: keeps the input elsewhere, and says how to have it back; None: where it is.
    """
    plain: Callable[..., Any] = type(module).forward.__get__(module)
    chance = any(isinstance(one, nn.Dropout) and one.p and one.training for one in module.modules())

    def again(hidden: Tensor, *rest: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(hidden, *rest, **named)
        call = _Call(index, plain, rest, named, put, chance)
        return _Recomputed.apply(call, hidden, _anchor(hidden))  # type: ignore[no-untyped-call]

    return again


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer, to be made again."""

    index: int
    run: Callable[..., Any]
    rest: Sequence[Any]
    named: dict[str, Any]
    put: Callable[[int, Tensor], Callable[[], Tensor]] | None
    chance: bool


class _Recomputed(torch.autograd.Function):
    """A layer that keeps its input alone. The gradients of its parameters are added while it runs again."""

    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, anchor: Tensor) -> Any:
        del anchor
        ctx.call, ctx.needs = call, hidden.requires_grad
        ctx.autocast = _autocast(hidden.device.type)
        ctx.random = _random_state(hidden.device) if call.chance else None
        ctx.fetch = None
        if call.put is not None:
            ctx.fetch = call.put(call.index, hidden)
        else:
            ctx.save_for_backward(hidden)
        return call.run(hidden, *call.rest, **call.named)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.fetch() if ctx.fetch is not None else ctx.saved_tensors[0]
        hidden = kept.detach().requires_grad_(ctx.needs)
        call: _Call = ctx.call
        with torch.enable_grad(), ctx.autocast(), _with_random_state(hidden.device, ctx.random):
            output = call.run(hidden, *call.rest, **call.named)
        outputs = output if isinstance(output, tuple) else (output,)
        pairs = [(one, slope) for one, slope in zip(outputs, slopes, strict=False) if _counts(one, slope)]
        if pairs:
            torch.autograd.backward([one for one, _ in pairs], [slope for _, slope in pairs])
        return None, hidden.grad, None


def _counts(output: Any, slope: Tensor | None) -> bool:
    return isinstance(output, Tensor) and output.requires_grad and slope is not None


def _anchor(hidden: Tensor) -> Tensor:
    """Something that asks for a gradient: the first layer's input does not where the embeddings are frozen."""
    return torch.zeros((), device=hidden.device, requires_grad=True)


def _autocast(kind: str) -> Callable[[], Any]:
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _with_random_state(device: torch.device, state: tuple[Tensor, Tensor | None] | None) -> Iterator[None]:
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
