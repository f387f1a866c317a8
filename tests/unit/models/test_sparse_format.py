"""Of every four numbers of a weight the two largest are kept as they were, and layers compute with just those.

The kernels run in Triton's interpreter, where Triton is installed and ``TRITON_INTERPRET=1`` asks for it.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import nn
from torch.nn import functional

from autoglm_lab.models import quantized_products, sparse_products
from autoglm_lab.models.precision import convert
from autoglm_lab.models.quantized_linear import QuantizedLinear
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.models.sparse_format import SparseFormat
from tests.unit.models.tiny_models import llama

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="Triton's interpreter was not asked for",
)


def made_up(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(form: SparseFormat, weights: torch.Tensor, step: int = 1000) -> torch.Tensor:
    held = torch.zeros(form.nbytes, dtype=torch.uint8)
    for first in range(0, form.rows, step):
        form.write(held, first, weights[first : first + step])
    return held


def pruned(weights: torch.Tensor) -> torch.Tensor:
    """The weights with the two smallest of each four taken out, said another way."""
    fours = weights.unflatten(1, (-1, 4))
    kept = torch.zeros_like(fours).scatter_(
        -1, fours.abs().sort(dim=-1, descending=True, stable=True).indices[..., :2], 1.0
    )
    return (fours * kept).flatten(1)


def layer_of(rows: int, columns: int) -> tuple[QuantizedLinear, torch.Tensor]:
    form, weights = SparseFormat(rows, columns, torch.float32), made_up(rows, columns)
    return QuantizedLinear(form, packed(form, weights), nn.Parameter(made_up(rows, seed=1)), torch.float32), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_two_largest_of_each_four_are_kept_as_they_were(dtype: torch.dtype) -> None:
    weights, form = made_up(40, 96).to(dtype), SparseFormat(40, 96, dtype)
    assert torch.equal(form.decode(packed(form, weights), 0, 40, dtype), pruned(weights))
    assert torch.equal(form.decode(packed(form, weights, 7), 11, 30, dtype), pruned(weights)[11:30])


def test_of_equal_sizes_those_on_the_left_are_kept() -> None:
    form, weights = SparseFormat(1, 8, torch.float32), torch.tensor([[1.0, -1, 1, 1, 0, 0, 0, 0]])
    assert form.decode(packed(form, weights), 0, 1, torch.float32).tolist() == [[1, -1, 0, 0, 0, 0, 0, 0]]


def test_a_weight_in_bfloat16_takes_nine_sixteenths_of_its_bytes() -> None:
    assert SparseFormat(4096, 4096, torch.bfloat16).nbytes == 4096 * 4096 * 2 * 9 // 16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_finite_number_is_refused(value: float) -> None:
    weights, form = made_up(4, 64), SparseFormat(4, 64, torch.float32)
    weights[1, 5] = value
    with pytest.raises(ValueError, match="not a finite number"):
        packed(form, weights)


@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 5, 96), (0, 96)])
def test_a_layer_multiplies_with_what_is_kept(shape: tuple[int, ...]) -> None:
    layer, weights = layer_of(40, 96)
    given = made_up(*shape, seed=2)
    assert repr(layer) == "QuantizedLinear(96, 40, bias=True, 2:4)"
    torch.testing.assert_close(layer(given), functional.linear(given, pruned(weights), layer.bias))


def test_gradients_reach_the_inputs() -> None:
    layer, weights = layer_of(48, 64)
    given, towards = made_up(5, 64, seed=2).requires_grad_(), made_up(5, 48, seed=3)
    layer(given).backward(towards)
    torch.testing.assert_close(given.grad, towards @ pruned(weights))


def test_linear_layers_alone_are_pruned() -> None:
    model = skeleton(llama(), torch.bfloat16)
    made = convert(model, {"text": "2:4"})
    assert {form.precision for _, form in made.packed.values()} == {"2:4"}
    assert type(model.model.embed_tokens) is nn.Embedding
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantizedLinear)


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(40, 256), (7, 96), (17, 2600)])
@pytest.mark.parametrize("count", [1, 3, 18])
def test_the_kernels_multiply_with_what_is_kept(rows: int, columns: int, count: int) -> None:
    (layer, weights), given = layer_of(rows, columns), made_up(count, columns, seed=2)
    result = quantized_products.product(given, layer.packed, layer.form)
    assert not quantized_products.why_not()
    assert result.shape == (count, rows)
    torch.testing.assert_close(result, given @ pruned(weights).T, atol=1e-4, rtol=1e-4)


@interpreted
def test_slices_are_decoded_by_a_kernel_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weights = layer_of(30, 1312)
    monkeypatch.setattr(SparseFormat, "decode", lambda *_: pytest.fail("not by the kernel"))
    assert torch.equal(sparse_products.decoded(layer.packed, layer.form, 3, 29, torch.float32), pruned(weights)[3:29])
