"""Layers with quantised weights compute what a layer with the decoded weights computes.

The kernels run in Triton's interpreter, where Triton is installed and ``TRITON_INTERPRET=1`` asks for it.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import nn
from torch.nn import functional

from autoglm_lab.models import quantized_products
from autoglm_lab.models.quantized_linear import QuantizedEmbedding, QuantizedLinear
from autoglm_lab.models.weight_format import Quantized, WeightFormat

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="Triton's interpreter was not asked for",
)
both = pytest.mark.parametrize("precision", ["int8", "int4"])


def made_up(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(rows: int, columns: int, precision: Quantized, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    form = WeightFormat.of(rows, columns, precision)
    packed = torch.zeros(form.nbytes, dtype=torch.uint8)
    form.write(packed, 0, made_up(rows, columns))
    return QuantizedLinear(form, packed, nn.Parameter(made_up(rows, seed=1).to(dtype)), dtype)


@both
@pytest.mark.parametrize("shape", [(192,), (3, 192), (2, 5, 192), (0, 192)])
def test_a_layer_is_the_linear_layer_of_its_decoded_weight(precision: Quantized, shape: tuple[int, ...]) -> None:
    layer, given = layer_of(40, 192, precision), made_up(*shape, seed=2)
    result = layer(given)
    assert result.shape == (*shape[:-1], 40)
    torch.testing.assert_close(result, functional.linear(given, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


@both
def test_no_more_than_a_slice_of_the_weight_is_decoded_at_once(
    precision: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, given = layer_of(100, 64, precision), made_up(70, 64)
    expected, slices = layer(given), []
    decode = WeightFormat.decode

    def counted(form: WeightFormat, packed: torch.Tensor, first: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        slices.append((end - first) * form.columns * dtype.itemsize)
        return decode(form, packed, first, end, dtype)

    monkeypatch.setattr(quantized_products, "SLICE_BYTES", 30 * 64 * 4)
    monkeypatch.setattr(quantized_products, "_has_kernels", lambda *_: False)
    monkeypatch.setattr(WeightFormat, "decode", counted)
    torch.testing.assert_close(layer(given), expected, atol=1e-5, rtol=1e-5)
    assert len(slices) == 4
    assert max(slices) <= 30 * 64 * 4


@both
def test_gradients_reach_the_inputs(precision: Quantized) -> None:
    layer, given = layer_of(48, 64, precision), made_up(5, 64).requires_grad_()
    towards = made_up(5, 48, seed=3)
    layer(given).backward(towards)
    assert given.grad is not None
    torch.testing.assert_close(given.grad, towards @ layer.weight, atol=1e-4, rtol=1e-4)
    assert layer.bias.grad is not None


def test_an_embedding_looks_up_decoded_rows() -> None:
    form = WeightFormat.of(50, 64, "int8")
    packed = torch.zeros(form.nbytes, dtype=torch.uint8)
    form.write(packed, 0, made_up(50, 64))
    table, ids = QuantizedEmbedding(form, packed, torch.bfloat16, None), torch.tensor([[3, 49, 3], [0, 1, 2]])
    assert torch.equal(table(ids), table.weight[ids])
    assert table(ids).dtype == torch.bfloat16


def test_a_layer_without_data_has_the_shape_of_its_result() -> None:
    form = WeightFormat.of(40, 64, "int4")
    layer = QuantizedLinear(form, torch.empty(form.nbytes, dtype=torch.uint8, device="meta"), None, torch.bfloat16)
    assert layer.weight.shape == (40, 64)
    assert layer(torch.empty(2, 3, 64, dtype=torch.bfloat16, device="meta")).shape == (2, 3, 40)
    assert repr(layer) == "QuantizedLinear(64, 40, bias=False, int4)"


@interpreted
@both
@pytest.mark.parametrize(("rows", "columns"), [(40, 256), (7, 96), (17, 384)])
@pytest.mark.parametrize("count", [1, 3, 18])
def test_the_kernels_multiply_as_the_decoded_weight_does(
    precision: Quantized, rows: int, columns: int, count: int
) -> None:
    layer, given = layer_of(rows, columns, precision), made_up(count, columns, seed=2)
    result = quantized_products.product(given, layer.packed, layer.form)
    assert not quantized_products.why_not()
    torch.testing.assert_close(result, given @ layer.weight.T, atol=1e-4, rtol=1e-4)


@interpreted
@both
def test_long_rows_are_summed_in_splits(precision: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = quantized_products.Tiles(16, 64)
    monkeypatch.setattr(quantized_products, "ONE_ROW", {precision: tiles})
    monkeypatch.setattr(quantized_products, "FEW", {precision: tiles})
    layer = layer_of(24, 640, precision)
    for count in (1, 2):
        given = made_up(count, 640, seed=2)
        result = quantized_products.product(given, layer.packed, layer.form)
        torch.testing.assert_close(result, given @ layer.weight.T, atol=1e-4, rtol=1e-4)


@interpreted
@both
def test_slices_are_decoded_by_a_kernel_to_the_same_bits(precision: Quantized) -> None:
    layer = layer_of(30, 1312 if precision == "int8" else 320, precision)
    decoded = quantized_products._decoded(layer.packed, layer.form, 3, 29, torch.float32)
    assert torch.equal(decoded, layer.weight[3:29])


@interpreted
def test_few_rows_never_decode_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_products, "_decoded", lambda *_: pytest.fail("a slice of the weight was decoded"))
    layer = layer_of(16, 64, "int4")
    for count in (1, 2):
        quantized_products.product(made_up(count, 64), layer.packed, layer.form)
