"""What adapters begin by reading, where some dialogues are to be kept: the directions in which the others are new.

An adapter adds ``B A x`` to a linear layer. With rows of A along which the inputs of kept dialogues are small, whatever
B learns changes little of what the model could do before. They are the generalised eigenvectors of two second moments:
of the inputs that new dialogues give the layer, and of those that kept ones do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

_DIALOGUES: Final = 64
"""That are looked at, of either kind."""
_ROWS, _FEW_ROWS, _WIDE = 32, 8, 1024
"""Inputs of each layer that a dialogue tells, and of a layer with more numbers than `_WIDE`: the work grows with the
cube of the rows."""
_RIDGE: Final = 0.001


def inputs_of(
    layers: Mapping[str, nn.Module], dialogues: Sequence[Any], run: Callable[[Any], None], seed: int
) -> dict[str, Tensor]:
    """Some of the inputs ``[rows, in]`` of each layer, on the host.

    Args:
        dialogues: of more than are looked at, every second one, every third …
        run: one dialogue through the model.
        seed: of the draw.
    """
    drawn: dict[str, list[Tensor]] = {name: [] for name in layers}
    generator = torch.Generator().manual_seed(seed)

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].detach().flatten(0, -2)
            if not len(rows):  # an expert that no token was sent to
                return
            count = _ROWS if rows.shape[-1] <= _WIDE else _FEW_ROWS
            chosen = torch.randint(len(rows), (count,), generator=generator)
            drawn[name].append(rows[chosen.to(rows.device)].cpu())

        return hook

    with _hooked(layers, look), torch.no_grad():
        for dialogue in dialogues[:: -(-len(dialogues) // _DIALOGUES)]:
            run(dialogue)
    return {name: torch.cat(rows) for name, rows in drawn.items() if rows}


def novel_directions(new: Tensor, kept: Tensor, rank: int) -> Tensor:
    """Directions along which ``new`` is large and ``kept`` is small, the best first, ``[<= rank, in]`` in float32.

    They are as long as leaves ``new`` a mean square of 1/3 along each: what an adapter's first values leave of inputs
    whose numbers have a mean square of 1.

    Args:
        new, kept: inputs of a layer, ``[rows, in]``.
    """
    new, kept = (rows.float() / len(rows) ** 0.5 for rows in (new, kept))
    squares, axes = _moments(kept)
    ridge = _RIDGE * float(squares.sum()) / kept.shape[1] or 1.0
    most = 1 / math.sqrt(ridge)
    factors = (squares + ridge).rsqrt() - most

    def whitened(rows: Tensor) -> Tensor:
        return rows * most + (rows @ axes * factors) @ axes.T

    strength, found = _moments(whitened(new))
    best = strength.argsort(descending=True)[:rank]
    directions = whitened(found[:, best].T)
    lengths: Tensor = ((new @ directions.T).square().sum(0) * 3).sqrt()
    return directions / lengths[:, None]


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above zero of ``rows.T @ rows`` and its eigenvectors ``[in, n]``, by the smaller of two ways."""
    wide = rows.shape[0] < rows.shape[1]
    squares, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    there = squares > 1e-6 * squares.max()
    squares, vectors = squares[there], vectors[:, there]
    return squares, rows.T @ vectors / squares.sqrt() if wide else vectors


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], look: Callable[[str], Any]) -> Iterator[None]:
    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
