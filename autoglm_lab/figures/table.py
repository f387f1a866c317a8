"""A table as plain text and as HTML."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """Rows of text under headings. Columns of figures align right.

    Attributes:
        columns: headings.
        rows: one text a column.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        columns = list(zip(self.columns, *self.rows, strict=True))
        widths = [max(map(_width, cells)) for cells in columns]
        rule = tuple("-" * width for width in widths)
        right = [_is_figures(cells[1:]) for cells in columns]
        return "\n".join(
            "  ".join(map(_padded, row, widths, right)).rstrip() for row in (self.columns, rule, *self.rows)
        )

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        sides = ["right" if _is_figures(cells) else "left" for cells in zip(*self.rows, strict=True)]
        body = "".join(_html_row(row, "td", sides) for row in self.rows)
        return f"<table><thead>{_html_row(self.columns, 'th', sides)}</thead><tbody>{body}</tbody></table>"


def _is_figures(cells: Sequence[str]) -> bool:
    """Every cell that is not empty begins like a number; a dash stands for one that is not known."""
    written = [cell for cell in cells if cell]
    return bool(written) and all(cell.lstrip("-+")[:1].isdigit() or cell == "–" for cell in written)


def _padded(cell: str, width: int, right: bool) -> str:
    space = " " * (width - _width(cell))
    return space + cell if right else cell + space


def _html_row(row: Sequence[str], tag: str, sides: Sequence[str]) -> str:
    cells = (f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for cell, side in zip(row, sides, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _width(text: str) -> int:
    """Columns of a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
