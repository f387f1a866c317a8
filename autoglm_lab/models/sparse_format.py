"""How a weight lies in memory with two of every four numbers: where they stood, and behind that what they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Sparse = Literal["2:4"]
_ALIGNMENT = 256


@dataclass(frozen=True)
class SparseFormat:
    """A weight ``[rows, columns]`` in one region of bytes, 2:4 semi-structured: of each four columns the two largest.

    Places: a byte for every 8 columns, four bits for each four of them, the first four in its low half: two bits say
    which column the first of the two kept numbers is of, the next two that of the second. Values: of a row first the
    first number of every four columns, then the second of every four, in ``dtype`` as they were.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    precision: Sparse = "2:4"

    @staticmethod
    def fits(columns: int) -> bool:
        """Whether rows of so many columns can be kept: two places share a byte."""
        return columns % 8 == 0

    @property
    def code_width(self) -> int:
        """Bytes of the places of a row."""
        return self.columns // 8

    @property
    def fours(self) -> int:
        """How many times four columns a row has."""
        return self.columns // 4

    @property
    def code_nbytes(self) -> int:
        """Bytes of all places, up to where the values begin."""
        return -(-self.rows * self.code_width // _ALIGNMENT) * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of places and values."""
        return self.code_nbytes + self.rows * self.columns // 2 * self.dtype.itemsize

    def codes(self, packed: Tensor) -> Tensor:
        """The places in ``packed`` (``uint8 [nbytes]``): ``uint8 [rows, columns / 8]``."""
        return packed[: self.rows * self.code_width].view(self.rows, self.code_width)

    def values(self, packed: Tensor) -> Tensor:
        """``dtype [rows, 2, columns / 4]``: the first and the second number kept of each four."""
        return packed[self.code_nbytes : self.nbytes].view(self.dtype).view(self.rows, 2, self.fours)

    def write(self, packed: Tensor, first: int, weights: Tensor) -> None:
        """Prune ``weights`` ``[some rows, columns]`` into the rows from ``first`` on.

        Raises:
            ValueError: a weight is not a number, or infinite.
        """
        if not bool(weights.isfinite().all()):
            raise ValueError("a weight is not a finite number")
        codes, values = self.encode(weights)
        end = first + weights.shape[0]
        self.codes(packed)[first:end] = codes
        self.values(packed)[first:end] = values

    def encode(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Places and values of ``weights`` ``[some rows, columns]``, as `codes` and `values` hold them.

        Of equal sizes the one on the left is kept, so that the same weight gives the same bytes everywhere.
        """
        fours = weights.unflatten(1, (self.fours, 4))
        columns = fours.abs().unbind(-1)
        beaten = [
            sum(
                (other >= one if right < left else other > one).to(torch.uint8)
                for right, other in enumerate(columns)
                if right != left
            )
            for left, one in enumerate(columns)
        ]
        kept = torch.stack([one < 2 for one in beaten], -1)
        first = torch.where(kept[..., 0], 0, torch.where(kept[..., 1], 1, 2))
        second = torch.where(kept[..., 3], 3, torch.where(kept[..., 2], 2, 1))
        places = (first | second << 2).to(torch.uint8)
        values = fours.gather(-1, torch.stack([first, second], -1)).transpose(1, 2)
        return places[:, ::2] | places[:, 1::2] << 4, values.to(self.dtype)

    def decode(self, packed: Tensor, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """The weights of some rows, zeros where none is kept: ``[end - first, columns]``."""
        codes, values = self.codes(packed)[first:end], self.values(packed)[first:end]
        places = torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()
        both = torch.stack([places & 3, places >> 2], -1)
        result = torch.zeros(end - first, self.fours, 4, dtype=dtype, device=packed.device)
        return result.scatter_(-1, both, values.transpose(1, 2).to(dtype)).flatten(1)
