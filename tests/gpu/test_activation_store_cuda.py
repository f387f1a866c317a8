from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoglm_lab.training.activation_store import ActivationStore

LAYERS, ROWS, WIDTH = 12, 4096, 2048
KEPT = ROWS * WIDTH * 4
"""Bytes of one tensor that a layer keeps."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.outside(torch.nn.functional.gelu(self.inside(hidden)))


def step(layers: list[Layer], hidden: Tensor, store: ActivationStore | None) -> tuple[int, list[Tensor]]:
    """The peak of forward and backward over what was there before, and the gradients."""
    for layer in layers:
        layer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if store is not None:
        store.begin_step()
    given = hidden
    for index, layer in enumerate(layers):
        if store is None:
            given = layer(given)
        else:
            with store.hooks(index):
                given = layer(given)
    given.square().mean().backward()
    torch.cuda.synchronize()
    gradients = [
        parameter.grad.clone() for layer in layers for parameter in layer.parameters() if parameter.grad is not None
    ]
    return torch.cuda.max_memory_allocated() - before, gradients


@pytest.fixture
def layers(device: torch.device) -> list[Layer]:
    return [Layer().to(device) for _ in range(LAYERS)]


def test_what_waits_on_the_host_is_not_on_the_device(layers: list[Layer], device: torch.device) -> None:
    hidden = torch.randn(ROWS, WIDTH, device=device)
    store = ActivationStore(device)
    store.ignoring(parameter for layer in layers for parameter in layer.parameters())
    plain, wanted = step(layers, hidden, None)
    for _ in range(3):  # the first finds no pinned memory yet, the others write over what the one before read
        moved, gradients = step(layers, hidden, store)
        for found, expected in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(found, expected)
    in_gradients = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    assert plain > 2 * LAYERS * KEPT  # a layer keeps its two inputs and what is between
    # Two layers that are back, copies on their way, a layer's own work, and gradients as they come.
    assert moved < in_gradients + (2 * 3 + 4 + 6) * KEPT
    assert plain - moved > LAYERS * KEPT / 2
