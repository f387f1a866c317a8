"""Packed weights that kernels are tried with."""

from __future__ import annotations

import torch

from autoglm_lab.models.quantized_products import Packed

SHAPES = [(4096, 4096), (27_392, 4096), (4096, 13_696), (256, 4096), (1000, 1536), (77, 96)]
"""Rows and columns: those of the phone model's layers, and odd ones."""


def packed_on(device: torch.device, form: Packed) -> torch.Tensor:
    """A made-up weight in this form, the same each time: ``uint8 [nbytes]``."""
    generator = torch.Generator(device=device).manual_seed(0)
    packed = torch.zeros(form.nbytes, dtype=torch.uint8, device=device)
    for first in range(0, form.rows, 1024):
        count = min(1024, form.rows - first)
        form.write(packed, first, torch.randn(count, form.columns, generator=generator, device=device) * 0.02)
    return packed
