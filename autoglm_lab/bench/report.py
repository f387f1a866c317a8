"""What a bench reports: figures of ours beside those of peers and the limit, and where they were taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoglm_lab.units import format_bytes, format_seconds

_VERDICTS = {True: "met", False: "MISSED", None: ""}


@dataclass(frozen=True)
class Figure:
    """One figure and what it stands beside.

    Attributes:
        name: what was measured.
        unit: ``B`` bytes, ``s`` seconds, ``tokens/s``, ``x`` a ratio, ``%`` …
        ours: the figure; None: it cannot be had here.
        peers: the same from others, by their name.
        limit: what the hardware allows; None: no such limit.
        interval: the 95 % interval of the figure, where it was taken from a sample.
        bar: what the figure has to reach, in words; empty: nothing.
        meets: whether it does; None: not judged (a small run, or a figure without a bar).
    """

    name: str
    unit: str
    ours: float | None
    peers: Mapping[str, float | None] = field(default_factory=dict)
    limit: float | None = None
    bar: str = ""
    meets: bool | None = None
    interval: tuple[float, float] | None = None

    def text(self, value: float | None) -> str:
        """A value of this figure for people."""
        if value is None:
            return "n/a"
        if self.unit == "B":
            return format_bytes(round(value))
        if self.unit == "s":
            return format_seconds(value)
        number = f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"
        return f"{number} {self.unit}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": self.ours,
            "peers": dict(self.peers),
            "limit": self.limit,
            "bar": self.bar,
            "meets": self.meets,
            "interval": None if self.interval is None else list(self.interval),
        }


@dataclass(frozen=True)
class Report:
    """The figures of one bench.

    Attributes:
        title: what was measured, in a line.
        machine: device, driver, versions, date and command, by name.
        figures: in the order they are shown.
        notes: what a reader has to know, one sentence each.
    """

    title: str
    machine: Mapping[str, str]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    @property
    def missed(self) -> tuple[Figure, ...]:
        """The figures that were judged and do not reach their bar."""
        return tuple(figure for figure in self.figures if figure.meets is False)

    def table(self) -> list[list[str]]:
        """Rows of text, the heading first; a column that no figure fills is left out."""
        peers = list(dict.fromkeys(peer for figure in self.figures for peer in figure.peers))
        rows = [["what", "ours", "95 %", *peers, "limit", "bar", ""]]
        for figure in self.figures:
            beside = [figure.text(figure.peers[peer]) if peer in figure.peers else "" for peer in peers]
            limit = "" if figure.limit is None else figure.text(figure.limit)
            between = "" if figure.interval is None else " to ".join(map(figure.text, figure.interval))
            ours = [figure.name, figure.text(figure.ours), between]
            rows.append([*ours, *beside, limit, figure.bar, _VERDICTS[figure.meets]])
        filled = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
        return [[row[column] for column in filled] for row in rows]

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        where = " · ".join(f"{name} {value}" if name != "device" else value for name, value in self.machine.items())
        return "\n".join([self.title, where, "", lines[0], "-" * len(lines[0]), *lines[1:], "", *self.notes]).rstrip()

    def to_markdown(self) -> str:
        """A section for docs/benchmarks.md."""
        head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in self.table()]
        machine = dict(self.machine)
        command = machine.pop("command", "")
        where = ", ".join(f"{name} {value}" if name != "device" else value for name, value in machine.items())
        table = ["| " + " | ".join(row) + " |" for row in ([*head], ["---"] * len(head), *rows)]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"### {self.title}", "", f"`{command}`; {where}.", "", *table, "", *notes]).rstrip() + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "machine": dict(self.machine),
            "figures": [figure.to_dict() for figure in self.figures],
            "notes": list(self.notes),
        }
