"""NF4: sixteen values for numbers of a normal distribution, and layers whose weights are kept so.

The kernel runs in Triton's interpreter, where Triton is installed and ``TRITON_INTERPRET=1`` asks for it.
"""

from __future__ import annotations

import importlib.util
import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from autoglm_lab.models import nf4, quantized_products
from autoglm_lab.models.quantized_linear import QuantizedLinear
from autoglm_lab.models.weight_format import WeightFormat

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="Triton's interpreter was not asked for",
)


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def packed(form: WeightFormat, weights: torch.Tensor, step: int = 1000) -> torch.Tensor:
    held = torch.zeros(form.nbytes, dtype=torch.uint8)
    for first in range(0, form.rows, step):
        form.write(held, first, weights[first : first + step])
    return held


def lost(precision: Any, weights: torch.Tensor) -> float:
    form = WeightFormat.of(*weights.shape, precision)
    read = form.decode(packed(form, weights), 0, form.rows, torch.float32)
    return float((read - weights).norm() / weights.norm())


def test_values_go_from_minus_one_over_zero_to_one_and_lie_closer_where_more_numbers_are() -> None:
    values = nf4.values()
    assert (len(values), values[0], values[7], values[15]) == (16, -1.0, 0.0, 1.0)
    steps = [after - before for before, after in pairwise(values)]
    assert steps[:7] == sorted(steps[:7], reverse=True)
    assert steps[7:] == sorted(steps[7:])


def test_a_number_becomes_the_nearest_value_times_the_largest_of_its_group() -> None:
    group = torch.linspace(-1, 1, 64)[None] * 0.5
    read = nf4.decode(*nf4.encode(group.unflatten(1, (1, 64))), torch.float32)
    known = torch.tensor(nf4.values()) * read.max()
    nearest = known[(group[0, :, None] - known).abs().argmin(1)]
    torch.testing.assert_close(read[0], nearest)
    assert 0.4 < read.max() <= 0.5


def test_normal_weights_lose_about_what_they_do_in_int4_and_take_less() -> None:
    weights = normal(64, 512)
    assert 0.08 < lost("nf4", weights) < 1.03 * lost("int4", weights)
    assert WeightFormat.of(4096, 4096, "nf4").nbytes == 4096 * 2048 + 4096 * 64 * 2
    assert WeightFormat.of(4096, 4096, "nf4").nbytes < WeightFormat.of(4096, 4096, "int4").nbytes


def test_clipping_outliers_loses_less_than_spanning_them() -> None:
    weights = normal(64, 64)
    known, largest = torch.tensor(nf4.values()), weights.abs().amax(1, keepdim=True)
    spanned = known[(weights[..., None] / largest[..., None] - known).abs().argmin(-1)] * largest
    assert lost("nf4", weights) < 0.97 * (spanned - weights).norm() / weights.norm()


def test_rows_written_in_pieces_are_the_same_to_the_bit() -> None:
    weights, form = normal(50, 192), WeightFormat.of(50, 192, "nf4")
    assert torch.equal(packed(form, weights), packed(form, weights, 7))


def test_a_row_of_zeros_stays_zero_and_what_is_no_number_is_refused() -> None:
    weights, form = normal(4, 128), WeightFormat.of(4, 128, "nf4")
    weights[2] = 0
    assert not form.decode(packed(form, weights), 2, 3, torch.float32).any()
    weights[1, 5] = float("inf")
    with pytest.raises(ValueError, match="not a finite number"):
        packed(form, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_its_way_back_are_those_of_the_decoded_weight(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = WeightFormat.of(40, 192, "nf4")
    layer = QuantizedLinear(form, packed(form, normal(40, 192)), nn.Parameter(torch.ones(40, dtype=dtype)), dtype)
    monkeypatch.setattr(quantized_products, "SLICE_BYTES", 192 * dtype.itemsize * 12)  # four slices
    given = normal(6, 192, seed=1).to(dtype).requires_grad_(True)
    again = given.detach().clone().requires_grad_(True)
    result, expected = layer(given), functional.linear(again, layer.weight, layer.bias)
    torch.testing.assert_close(result, expected)
    slopes = normal(6, 40, seed=2).to(dtype)
    result.backward(slopes)
    expected.backward(slopes)
    torch.testing.assert_close(given.grad, again.grad, rtol=0.02, atol=1e-4 if dtype == torch.bfloat16 else 1e-6)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_decodes_what_torch_decodes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    form = WeightFormat.of(37, 96, "nf4")
    held = packed(form, normal(37, 96))
    assert nf4._has_kernel(held)
    by_kernel = form.decode(held, 5, 37, dtype)
    monkeypatch.setattr(nf4, "_has_kernel", lambda _: False)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps  # the interpreter cuts bits off
    torch.testing.assert_close(by_kernel, form.decode(held, 5, 37, dtype), rtol=rounding, atol=0)


@pytest.mark.peer
def test_it_is_bitsandbytes_nf4() -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(torch.tensor(nf4.values()), theirs.get_4bit_type("nf4", device="cpu"), atol=1e-6, rtol=0)
    weights = normal(64, 512)
    codes, state = theirs.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    error = (theirs.dequantize_4bit(codes, state) - weights).norm() / weights.norm()
    assert lost("nf4", weights) < 0.97 * error
