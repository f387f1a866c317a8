from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoglm_lab.models.chunked_loss import next_token_loss


@pytest.mark.parametrize("chunk", [1, 16, 4096])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_equal_the_plain_ones(chunk: int, *, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(24, 301, bias=bias)
    hidden = torch.randn(3, 17, 24, generator=generator, requires_grad=True)
    labels = torch.randint(0, 301, (3, 17), generator=generator)
    labels[torch.rand(3, 17, generator=generator) < 0.4] = -100
    count = int((labels[:, 1:] != -100).sum())

    plain = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    wanted = torch.autograd.grad(plain, [hidden, *head.parameters()])
    chunked = next_token_loss(hidden, labels, head, chunk=chunk, count=count)
    found = torch.autograd.grad(chunked, [hidden, *head.parameters()])

    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_tensor_is_as_large_as_all_logits() -> None:
    """Every tensor that the loss makes, forward and backward, is seen; the plain loss is caught by the same net."""
    head = nn.Linear(8, 5000, bias=False).requires_grad_(False)
    hidden = torch.randn(1, 400, 8, requires_grad=True)
    labels = torch.randint(0, 5000, (1, 400))
    assert _largest(lambda: next_token_loss(hidden, labels, head, chunk=20, count=399)) <= 20 * 5000
    plain = _largest(lambda: F.cross_entropy(head(hidden)[0, :-1], labels[0, 1:]))
    assert plain >= 399 * 5000


def test_a_batch_without_labels_costs_nothing_and_gives_no_gradient() -> None:
    head = nn.Linear(4, 9)
    hidden = torch.randn(1, 5, 4, requires_grad=True)
    loss = next_token_loss(hidden, torch.full((1, 5), -100), head, chunk=16, count=0)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and not hidden.grad.any()


def _largest(compute: object) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple | list) else (made,):
                if isinstance(one, torch.Tensor):
                    self.largest = max(self.largest, one.numel())
            return made

    with Sizes() as sizes:
        compute().backward()  # type: ignore[operator]
    return sizes.largest
