from __future__ import annotations

import pytest
import torch

from autoglm_lab.models.weight_format import Quantized, WeightFormat

BITS = {"int8": 8, "int4": 4}


def made_up(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def packed(form: WeightFormat, weights: torch.Tensor, step: int = 1000) -> torch.Tensor:
    held = torch.zeros(form.nbytes, dtype=torch.uint8)
    for first in range(0, form.rows, step):
        form.write(held, first, weights[first : first + step])
    return held


@pytest.mark.parametrize(("precision", "lost"), [("int8", 0.02), ("int4", 0.12)])
def test_what_is_written_is_read_back_but_for_rounding(precision: Quantized, lost: float) -> None:
    weights, form = made_up(40, 256), WeightFormat.of(40, 256, precision)
    read = form.decode(packed(form, weights), 0, 40, torch.float32)
    error = (read - weights).norm() / weights.norm()
    assert lost / 20 < error < lost


@pytest.mark.parametrize(
    ("precision", "nbytes"), [("int8", 4096 * 4096 + 4 * 4096), ("int4", 4096 * 2048 + 4096 * 64 * 4)]
)
def test_the_bytes_are_those_of_codes_and_scales(precision: Quantized, nbytes: int) -> None:
    assert WeightFormat.of(4096, 4096, precision).nbytes == nbytes


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_written_in_pieces_are_the_same_to_the_bit(precision: Quantized) -> None:
    weights, form = made_up(50, 192), WeightFormat.of(50, 192, precision)
    assert torch.equal(packed(form, weights), packed(form, weights, 7))


@pytest.mark.parametrize(("columns", "group"), [(4096, 64), (13_696, 64), (1536, 64), (96, 32)])
def test_groups_are_as_long_as_the_columns_let_them_be(columns: int, group: int) -> None:
    assert WeightFormat.of(8, columns, "int4").group == group


def test_columns_that_no_group_divides_are_kept_in_8_bits() -> None:
    assert WeightFormat.of(8, 100, "int4").precision == "int8"


def test_clipping_outliers_loses_less_than_spanning_them() -> None:
    weights, form = made_up(64, 64), WeightFormat.of(64, 64, "int4")
    low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    step = (high - low) / 15
    spanned = ((weights - low) / step).round() * step + low
    read = form.decode(packed(form, weights), 0, 64, torch.float32)
    assert (read - weights).square().sum() < 0.95 * (spanned - weights).square().sum()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_row_of_zeros_stays_zero(precision: Quantized) -> None:
    weights, form = made_up(4, 128), WeightFormat.of(4, 128, precision)
    weights[2] = 0
    assert not form.decode(packed(form, weights), 2, 3, torch.float32).any()


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_finite_number_is_refused(precision: Quantized, value: float) -> None:
    weights, form = made_up(4, 128), WeightFormat.of(4, 128, precision)
    weights[1, 5] = value
    with pytest.raises(ValueError, match="not a finite number"):
        packed(form, weights)


@pytest.mark.peer
def test_codes_in_8_bits_are_torchaos() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    weights = made_up(32, 256)
    layer = torch.nn.Linear(256, 32, bias=False)
    layer.weight.data.copy_(weights)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    codes, scales = WeightFormat.of(32, 256, "int8").encode(weights)
    assert torch.equal(codes, layer.weight.qdata)
    assert torch.equal(scales, layer.weight.scale)
