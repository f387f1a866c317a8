from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from autoglm_lab.models.float32_attention import Float32Attention


def inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(2, 4, 9, 16).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_it_is_float32_attention_rounded_at_the_end(cast: bool, mask: str | None) -> None:
    """On half-precision inputs, and on float32 ones that autocast would round."""
    given = inputs(torch.float32 if cast else torch.bfloat16)
    seen = torch.ones(9, 9).tril().bool()
    told = None if mask is None else seen if mask == "bool" else torch.zeros(9, 9).masked_fill(~seen, -1e4)
    typed = told.bfloat16() if told is not None and mask == "float" and not cast else told
    with torch.autocast("cpu", torch.bfloat16) if cast else contextlib.nullcontext(), Float32Attention():
        made = scaled_dot_product_attention(*given, typed)
    expected = scaled_dot_product_attention(*(one.detach().float() for one in given), told)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, expected.bfloat16())
    made.float().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in given)


def test_float32_stays_as_it_is() -> None:
    given = inputs(torch.float32)
    with Float32Attention():
        made = scaled_dot_product_attention(*given, is_causal=True)
    assert torch.equal(made, scaled_dot_product_attention(*given, is_causal=True))
