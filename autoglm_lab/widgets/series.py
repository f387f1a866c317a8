"""Samples as bytes for the live plot: a few dozen for each, so that drawing costs the kernel next to nothing."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

from autoglm_lab.memory.ledger import Ledger, Row
from autoglm_lab.widgets.palette import colour_key, rank, scope

FIXED_COLUMNS = 2
"""Columns before the rows: the process, the budget."""
MOST_SERIES = 40
"""Rows that appear after so many are added to the last one of their kind."""


class SeriesBook:
    """Gives every row a column of its own, for good: old samples stay valid when a new owner appears.

    One message is, little-endian: ``uint32`` samples, ``uint32`` columns, then for each sample a ``float64`` time in
    seconds since the epoch and its columns as ``float32`` bytes; NaN where the machine cannot tell. A message with
    fewer columns than another says nothing of the later ones: zero.
    """

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], int] = {}
        self._series: list[dict[str, Any]] = []

    @property
    def series(self) -> list[dict[str, Any]]:
        """Name, kind, colour and scope of each column after the fixed ones. Grows only at its end."""
        return list(self._series)

    def encode(self, samples: Sequence[Ledger]) -> bytes:
        """The samples as one message."""
        rows = [self._row(ledger) for ledger in samples]
        columns = FIXED_COLUMNS + len(self._series)
        layout = struct.Struct(f"<d{columns}f")
        parts = [struct.pack("<II", len(samples), columns)]
        for ledger, values in zip(samples, rows, strict=True):
            values.extend([0.0] * (columns - len(values)))
            parts.append(layout.pack(ledger.time, *values))
        return b"".join(parts)

    def _row(self, ledger: Ledger) -> list[float]:
        values = [_number(ledger.process), _number(ledger.budget)] + [0.0] * len(self._series)
        for row in ledger.rows:
            if row.place != "device" or row.kind == "free":
                continue
            column = FIXED_COLUMNS + self._column(row)
            if column >= len(values):
                values.append(0.0)
            values[column] += _number(row.nbytes)
        return values

    def _column(self, row: Row) -> int:
        key = (row.kind, row.name)
        if key not in self._columns:
            if len(self._series) >= MOST_SERIES:
                of_kind = [column for (kind, _), column in self._columns.items() if kind == row.kind]
                self._columns[key] = of_kind[-1] if of_kind else len(self._series) - 1
            else:
                self._columns[key] = len(self._series)
                shown = {
                    "name": row.name,
                    "kind": row.kind,
                    "colour": colour_key(row),
                    "scope": scope(row),
                    "rank": rank(row),
                }
                self._series.append(shown)
        return self._columns[key]


def thin(samples: Sequence[Ledger], most: int) -> list[Ledger]:
    """At most ``most`` samples: of each stretch the one with the highest process figure, so that no peak is lost."""
    if len(samples) <= most:
        return list(samples)
    step = math.ceil(len(samples) / most)
    stretches = (samples[start : start + step] for start in range(0, len(samples), step))
    return [max(stretch, key=lambda ledger: ledger.process or 0) for stretch in stretches]


def _number(nbytes: int | None) -> float:
    return math.nan if nbytes is None else float(nbytes)
