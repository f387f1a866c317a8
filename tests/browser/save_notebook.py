"""Run a notebook and save it with outputs that show without a kernel: ``python -m tests.browser.save_notebook [FILE]``.

Widget views and their state are left out: where no kernel runs, the static page beside each of them shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.browser.servers import NOTEBOOKS

_VIEW = "application/vnd.jupyter.widget-view+json"


def main(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, store_widget_state=False, resources=where).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _VIEW not in output.get("data", {})]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOKS / "00_workbench.ipynb")
