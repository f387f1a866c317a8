"""Muon for the matrices (Jordan et al., 2024: momentum orthogonalised by Newton-Schulz), AdamW for the rest."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def orthogonalise(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly the closest semi-orthogonal matrix of each of [n, rows, columns], rows <= columns, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = stack.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon:
    """Matrices of one shape are orthogonalised in one batch. Updates have an RMS of 0.2 x lr, as AdamW's roughly do."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.05) -> None:
        self.momentum, self.decay = momentum, decay
        self.by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            self.by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        self.moments = {shape: torch.zeros(len(p), *shape, device=p[0].device) for shape, p in self.by_shape.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, parameters in self.by_shape.items():
            gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
            moment = self.moments[shape]
            moment.lerp_(gradient, 1 - self.momentum)
            update = gradient.lerp(moment, self.momentum)
            tall = shape[0] > shape[1]
            update = orthogonalise(update.mT if tall else update)
            update = (update.mT if tall else update).float() * (0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(parameters, 1 - lr * self.decay)
            torch._foreach_add_(parameters, list(update.unbind()), alpha=-lr)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices inside the towers, everything else: embeddings, convolutions, norms, biases, side heads)."""
    matrices, rest = [], []
    for name, parameter in module.named_parameters():
        inner = name.startswith("model.model.") and "embed" not in name and "bias_" not in name
        (matrices if inner and parameter.ndim == 2 else rest).append(parameter)
    return matrices, rest
