"""Figures and tables for notebooks, that stay readable wherever the notebook goes.

JupyterLab shows the plotly figure (by plotly's own extension: no network). Where no JavaScript runs, in an exported
page or on a code host, the same data stands there as an SVG picture and a table; as plain text it is the table.
"""

from __future__ import annotations

from autoglm_lab.figures.figure import Figure, bars, lines
from autoglm_lab.figures.table import Table

__all__ = ["Figure", "Table", "bars", "lines"]
