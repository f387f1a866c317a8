"""Weights in 8 and 4 bits on CUDA: kernels against decoded weights, captured steps, bytes, and what a load holds."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import autoglm_lab as lab
from autoglm_lab.models import quantized_products
from autoglm_lab.models.weight_format import Quantized, WeightFormat
from autoglm_lab.units import GiB, MiB
from tests.gpu.packed_weights import SHAPES, packed_on


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_those_of_the_decoded_weight(
    device: torch.device, precision: Quantized, shape: tuple[int, int]
) -> None:
    form = WeightFormat.of(*shape, precision)
    packed = packed_on(device, form)
    weight = form.decode(packed, 0, form.rows, torch.float32)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        for count in (1, 2, 5, 16, 33, 64, 65, 300):
            given = torch.randn(count, form.columns, device=device).to(dtype)
            result = quantized_products.product(given, packed, form)
            expected = functional.linear(given.double(), weight.double())
            error = (result.double() - expected).abs().max() / expected.abs().max()
            assert error < tolerance, (dtype, count, float(error))
    assert not quantized_products.why_not()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_few_rows_take_no_memory_beside_their_result(device: torch.device, precision: Quantized) -> None:
    form = WeightFormat.of(27_392, 4096, precision)
    packed, given = packed_on(device, form), torch.randn(1, 4096, device=device, dtype=torch.bfloat16)
    quantized_products.product(given, packed, form)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    quantized_products.product(given, packed, form)
    assert torch.cuda.max_memory_allocated(device) - before < 1 * MiB
    torch.cuda.reset_peak_memory_stats(device)
    quantized_products.product(given.expand(512, -1).contiguous(), packed, form)
    most = 512 * 27_392 * 2 + quantized_products.SLICE_BYTES + 512 * 4096 * 4 + 16 * MiB
    assert torch.cuda.max_memory_allocated(device) - before < most


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_captured_steps_answer_as_uncaptured_ones(quantize: str) -> None:
    with lab.load("autoglm-tiny", device="cuda", dtype="float32", quantize=quantize) as wb:
        answers = []
        for graphs in (False, True):
            wb.policy = wb.policy.replace(kv={"graphs": graphs, "reuse": False, "prefix_bytes": 0})
            answers.append(wb.chat("你是谁?", conversation=f"graphs {graphs}").result(120).text)
        assert answers[0] == answers[1]
        captured = [event for event in wb.events if event.subject == "decode graphs"]
        assert captured and not any("cannot be captured" in event.why for event in captured)
        wb.modules["text"].park().result()
        assert wb.modules["text"].info.place == "host"
        assert wb.chat("你是谁?", conversation="woken").result(120).text == answers[0]


@pytest.mark.parametrize(("quantize", "most"), [("int8", 12.0), ("int4", 8.0)])
def test_the_phone_model_takes_no_more_than_its_bar(quantize: str, most: float) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    with lab.load("autoglm-phone-9b", weights="dummy", device="cuda", quantize=quantize) as wb:
        peak = torch.cuda.max_memory_reserved() - before
        assert peak < 0.2 * GiB, f"{peak / MiB:.0f} MiB beside the weights while they came"
        wb.modules["vision"].park().result()
        wb.chat("Who are you?", max_new_tokens=16).result(300)
        wb.reclaim()
        ledger = wb.memory
        assert ledger.process is not None
        assert ledger.process <= most * GiB
