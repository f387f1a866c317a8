"""How a weight lies in memory in 8 or 4 bits: codes, and behind them what scales them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from autoglm_lab.models import nf4

Quantized = Literal["int8", "int4", "nf4"]
_GROUPS = (64, 32)
_ALIGNMENT = 256
_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.74)
_LEAST_SCALE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class WeightFormat:
    """A weight ``[rows, columns]`` in one region of bytes.

    ``int8``: a code a number, symmetric, and a float32 scale a row; the codes are those of torchao's
    ``Int8WeightOnlyConfig``. ``int4``: two codes a byte, and a bfloat16 scale and minimum for every ``group`` columns.
    Of the bytes of a group, byte ``j`` holds column ``j`` in its low half and column ``j + group / 2`` in its high one.
    ``nf4``: codes as in int4, of sixteen values that fit a normal distribution (`nf4`), and a bfloat16 scale a group.
    """

    rows: int
    columns: int
    precision: Quantized

    @classmethod
    def of(cls, rows: int, columns: int, precision: Quantized) -> WeightFormat:
        """The format of a weight; 4 bits need columns that groups divide, else int8 it is."""
        divided = any(columns % group == 0 for group in _GROUPS)
        return cls(rows, columns, precision if divided or precision == "int8" else "int8")

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        if self.precision == "int8":
            return self.columns
        return next(group for group in _GROUPS if self.columns % group == 0)

    @property
    def code_width(self) -> int:
        """Bytes of the codes of a row."""
        return self.columns if self.precision == "int8" else self.columns // 2

    @property
    def code_nbytes(self) -> int:
        """Bytes of all codes, up to where the scales begin."""
        return -(-self.rows * self.code_width // _ALIGNMENT) * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        a_group = 2 if self.precision == "nf4" else 4
        return self.code_nbytes + self.rows * a_group * (self.columns // self.group)

    def codes(self, packed: Tensor) -> Tensor:
        """The codes in ``packed`` (``uint8 [nbytes]``): ``int8 [rows, columns]`` or ``uint8 [rows, columns / 2]``."""
        held = packed[: self.rows * self.code_width].view(self.rows, self.code_width)
        return held.view(torch.int8) if self.precision == "int8" else held

    def scales(self, packed: Tensor) -> Tensor:
        """``float32 [rows, 1]``, or ``bfloat16 [rows, columns / group, 2]``: scale and minimum; in nf4 1: the scale."""
        held = packed[self.code_nbytes : self.nbytes]
        if self.precision == "int8":
            return held.view(torch.float32).view(self.rows, 1)
        return held.view(torch.bfloat16).view(self.rows, self.columns // self.group, -1)

    def write(self, packed: Tensor, first: int, weights: Tensor) -> None:
        """Quantise ``weights`` ``[some rows, columns]`` into the rows from ``first`` on.

        Raises:
            ValueError: a weight is not a number, or infinite.
        """
        codes, scales = self.encode(weights)
        if not bool(scales.isfinite().all()):
            raise ValueError("a weight is not a finite number")
        end = first + weights.shape[0]
        self.codes(packed)[first:end] = codes
        self.scales(packed)[first:end] = scales

    def encode(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of ``weights`` ``[some rows, columns]``, as `codes` and `scales` hold them."""
        numbers = weights.float()
        if self.precision == "int8":
            scale = (numbers.abs().amax(1, keepdim=True) / 127.5).clamp_min(_LEAST_SCALE)
            return (numbers * (1.0 / scale)).round_().clamp_(-128, 127).to(torch.int8), scale
        grouped = numbers.unflatten(1, (-1, self.group))
        return nf4.encode(grouped) if self.precision == "nf4" else _encode_in_groups(grouped)

    def decode(self, packed: Tensor, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """The weights of some rows: ``[end - first, columns]``."""
        codes, scales = self.codes(packed)[first:end], self.scales(packed)[first:end]
        return self.decode_rows(codes, scales, dtype)

    def decode_rows(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights behind rows of codes and of scales."""
        if self.precision == "int8":
            return codes.to(dtype).mul_(scales)
        if self.precision == "nf4":
            return nf4.decode(codes, scales, dtype)
        bytes_ = codes.unflatten(-1, (-1, self.group // 2))
        numbers = torch.cat([bytes_ & 15, bytes_ >> 4], dim=-1).to(torch.float32)
        numbers.mul_(scales[..., :1]).add_(scales[..., 1:])
        return numbers.flatten(-2).to(dtype)


def _encode_in_groups(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``[rows, groups, group]``.

    The range that the 16 codes span is shrunk as long as the squared error falls: clipping a few outliers makes the
    steps between all others finer.
    """
    low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best = torch.full_like(low, float("inf"))
    scale, minimum = torch.empty_like(low), torch.empty_like(low)
    for shrink in _SHRINKS:
        step = (half * (shrink * 2 / 15)).clamp_min(_LEAST_SCALE).bfloat16().float()
        start = (middle - half * shrink).bfloat16().float()
        error = _codes(numbers, step, start).mul_(step).add_(start).sub_(numbers).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, step, scale), torch.where(better, start, minimum)
    finite = torch.isfinite(best)
    scale, minimum = torch.where(finite, scale, float("nan")), torch.where(finite, minimum, float("nan"))
    codes = _codes(numbers, scale, minimum).to(torch.uint8)
    width = numbers.shape[-1] // 2
    packed = codes[..., :width] | (codes[..., width:] << 4)
    return packed.flatten(1), torch.cat([scale, minimum], dim=-1).bfloat16()


def _codes(numbers: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return (numbers - minimum).div_(scale).round_().clamp_(0, 15)
