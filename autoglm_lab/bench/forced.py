"""Logits along a given text, from the engine's steps and from plain transformers: how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoglm_lab.bench.stock import Stock
from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.messages import read_messages
from autoglm_lab.engine.prompt import render
from autoglm_lab.workbench import Workbench


def greedy(stock: Stock, messages: Sequence[dict[str, Any]], count: int) -> tuple[list[int], Tensor]:
    """Plain transformers' own ``count`` tokens, and its logits ``[count, vocab]`` before each."""
    logits, cache = stock.read(stock.batch(messages))
    ids, rows = [int(logits.argmax())], [logits.cpu()]
    for _ in range(count - 1):
        logits = stock.follow(ids[-1:], cache)
        rows.append(logits.cpu())
        ids.append(int(logits.argmax()))
    return ids, torch.stack(rows)


def along(stock: Stock, messages: Sequence[dict[str, Any]], ids: Sequence[int]) -> Tensor:
    """Plain transformers' logits ``[len(ids), vocab]`` before each of ``ids``, one token a step."""
    logits, cache = stock.read(stock.batch(messages))
    rows = [logits.cpu()]
    rows += [stock.follow([token], cache).cpu() for token in ids[:-1]]
    return torch.stack(rows)


def ours_along(workbench: Workbench, messages: Sequence[dict[str, Any]], ids: Sequence[int]) -> Tensor:
    """The engine's logits ``[len(ids), vocab]`` before each of ``ids``, by the steps that answers are made of.

    No turn may be under way: these steps run in the caller's thread.
    """
    state = workbench.engine.state
    prompt = render(workbench.model, workbench.processor, read_messages(messages))
    kept = KvState(state.pool)
    try:
        logits = state.stepper.prefill(kept, prompt, 0, chunk=state.policy.kv.chunk)
        assert logits is not None
        rows = [logits.cpu()]
        rows += [state.stepper.decode([kept], [token])[0].cpu() for token in ids[:-1]]
    finally:
        kept.clear()
    return torch.stack(rows)


def apart(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The largest and the mean difference of two sets of logits."""
    difference = (one - other).abs()
    return float(difference.max()), float(difference.mean())
