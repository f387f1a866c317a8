"""``python -m autoglm_lab.bench``: the same as ``autoglm-lab bench``."""

from __future__ import annotations

import sys

import typer

from autoglm_lab.bench.command import bench
from autoglm_lab.errors import LabError

if __name__ == "__main__":
    try:
        typer.run(bench)
    except LabError as error:
        typer.echo(f"autoglm-lab bench: {error}", err=True)
        sys.exit(1)
