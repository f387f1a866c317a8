"""2:4 sparse weights on CUDA: kernels against decoded weights, and captured steps through parks and wakes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import autoglm_lab as lab
from autoglm_lab.models import quantized_products
from autoglm_lab.models.sparse_format import SparseFormat
from autoglm_lab.units import MiB
from tests.gpu.packed_weights import SHAPES, packed_on


@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_those_of_the_decoded_weight(device: torch.device, shape: tuple[int, int]) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        form = SparseFormat(*shape, dtype)
        packed = packed_on(device, form)
        weight = form.decode(packed, 0, form.rows, torch.float32)
        for count in (1, 2, 5, 16, 33, 64, 65, 300):
            given = torch.randn(count, form.columns, device=device).to(dtype)
            result = quantized_products.product(given, packed, form)
            expected = functional.linear(given.double(), weight.double())
            error = (result.double() - expected).abs().max() / expected.abs().max()
            assert error < tolerance, (dtype, count, float(error))
    assert not quantized_products.why_not()


def test_a_row_takes_no_memory_beside_its_result(device: torch.device) -> None:
    form = SparseFormat(27_392, 4096, torch.bfloat16)
    packed, given = packed_on(device, form), torch.randn(1, 4096, device=device, dtype=torch.bfloat16)
    quantized_products.product(given, packed, form)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    quantized_products.product(given, packed, form)
    assert torch.cuda.max_memory_allocated(device) - before < 1 * MiB


def test_captured_steps_answer_the_same_after_a_park_and_a_wake(device: torch.device) -> None:
    with lab.load("autoglm-tiny", device=str(device), dtype="float32", quantize={"text": "2:4"}) as workbench:
        answer = workbench.chat("你是谁?", max_new_tokens=32).result(100).text
        workbench.modules["text"].park().result()
        assert workbench.chat("你是谁?", conversation="again", max_new_tokens=32).result(100).text == answer
        workbench.policy = workbench.policy.replace(kv={"graphs": False})
        assert workbench.chat("你是谁?", conversation="plain", max_new_tokens=32).result(100).text == answer
