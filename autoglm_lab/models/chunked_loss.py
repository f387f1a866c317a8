"""Next-token loss over slices of tokens: the logits of a whole sequence never exist.

The gradient is computed with the loss, slice by slice, as Liger kernels do: the head runs once, and nothing of the
vocabulary's width is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autoglm_lab.models.quantized_linear import QuantizedLinear
from autoglm_lab.models.quantized_products import product_backward

IGNORED = -100


def next_token_loss(hidden: Tensor, labels: Tensor, head: nn.Linear, *, chunk: int, count: int) -> Tensor:
    """The summed cross-entropy of every token given those before it, divided by ``count``.

    At most ``chunk`` rows of logits exist at a time, in float32. Positions without a label cost nothing.

    Args:
        hidden: the decoder's output, ``[batch, seq, width]``.
        labels: ``[batch, seq]``, not shifted; ``-100`` is left out.
        head: from width to vocabulary; one that is kept quantised is decoded in slices, and does not learn.
        chunk: tokens a slice.
        count: what the sum is divided by: the tokens with a label of the whole step, so that the sizes of micro-batches
            change nothing.
    """
    targets = labels[:, 1:].reshape(-1)
    rows = (targets != IGNORED).nonzero().squeeze(-1)
    picked = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, rows)
    wanted, scale = targets.index_select(0, rows), 1 / max(count, 1)
    weight = None if isinstance(head, QuantizedLinear) else head.weight
    loss: Tensor = _Loss.apply(picked, wanted, head, weight, head.bias, chunk, scale)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    """Cross-entropy of what the head makes of ``hidden`` against targets, and its gradients, by slices."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Linear,
        weight: Tensor | None,
        bias: Tensor | None,
        chunk: int,
        scale: float,
    ) -> Tensor:
        dtype = head.dtype if isinstance(head, QuantizedLinear) else head.weight.dtype
        needed = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if needed[0] else None
        to_weight = torch.zeros_like(weight) if weight is not None and needed[3] else None
        to_bias = torch.zeros_like(bias) if bias is not None and needed[4] else None
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk].to(dtype)
            wanted = targets[start : start + chunk]
            logits = head(part).float()
            total += F.cross_entropy(logits, wanted, reduction="sum")
            if not any(needed[:5]):
                continue
            slope = logits.softmax(-1)
            del logits
            slope[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
            slope = slope.mul_(scale).to(dtype)
            if to_hidden is not None:
                to_hidden[start : start + chunk] = _back(slope, head).to(hidden.dtype)
            if to_weight is not None:
                to_weight.addmm_(slope.mT, part)
            if to_bias is not None:
                to_bias += slope.sum(0)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if one is None else one * slope.to(one.dtype) for one in ctx.saved_tensors]
        to_hidden, to_weight, to_bias = found
        return to_hidden, None, None, to_weight, to_bias, None, None


def _back(slope: Tensor, head: nn.Linear) -> Tensor:
    if isinstance(head, QuantizedLinear):
        return product_backward(slope, head.packed, head.form)
    return slope @ head.weight
