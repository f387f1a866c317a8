"""Python's collector of reference cycles, held off while a model is built."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Make no search for cycles meanwhile: beside torch and transformers one takes 0.3 s, a model's parts start many,
    and building one leaves none that could not wait. ``gc.collect()`` itself still works.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
