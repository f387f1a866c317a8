"""How threads that compute together wait for one another, as long as torch is not loaded yet."""

from __future__ import annotations

import os

_TURNS = "10000"
"""About a tenth of a millisecond: longer than what lies between two products of a step."""


def wait_briefly() -> None:
    """Let a thread that has done its part sleep soon; OpenMP would let it turn for milliseconds.

    Where something else runs on one of the cores, a thread that turns keeps its core from the one that it waits for.
    What the environment says already stays; an OpenMP other than GNU's reads nothing of it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _TURNS)
