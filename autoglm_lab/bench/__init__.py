"""The figures that the README quotes, each beside its peers and its limit, from one run.

A bench is a file of this folder with ``run(bench: Bench) -> Report``; `CATALOG` names them. Importing this package
loads no torch.
"""

from autoglm_lab.bench.catalog import CATALOG
from autoglm_lab.bench.report import Figure, Report

__all__ = ["CATALOG", "Figure", "Report"]
