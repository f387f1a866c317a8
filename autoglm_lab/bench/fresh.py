"""One measurement in a process of its own, where nothing of another one is left."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from typing import Any

_MARK = "autoglm-lab figures: "


def fresh(function: str, timeout: float = 300.0, **arguments: Any) -> dict[str, Any]:
    """Call ``"module:function"`` with ``arguments`` in a new process; what it returns has to be JSON.

    Returns:
        Its figures, or ``{"error": text}`` with the last line of what it said before it failed.
    """
    command = [sys.executable, "-m", "autoglm_lab.bench.fresh", function, json.dumps(arguments)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {timeout:g} s"}
    found = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if found:
        return dict(json.loads(found[-1]))
    said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
    return {"error": said[-1]}


def main() -> None:
    """The other side of `fresh`."""
    name, given = sys.argv[1:]
    module, _, function = name.partition(":")
    with contextlib.redirect_stdout(sys.stderr):
        figures = getattr(importlib.import_module(module), function)(**json.loads(given))
    sys.stdout.write(f"{_MARK}{json.dumps(figures)}\n")


if __name__ == "__main__":
    main()
