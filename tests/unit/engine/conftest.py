"""A picture and a sound to ask about, whatever they show; and the workbench from afar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

import autoglm_lab as lab
from autoglm_lab.serving import serve


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def sound() -> Any:
    return (np.random.default_rng(1).normal(size=20_000) * 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def url(loaded: lab.Workbench) -> Iterator[str]:
    with serve(loaded, port=0) as service:
        yield service.url


@pytest.fixture
def remote(wb: lab.Workbench, url: str) -> Iterator[lab.RemoteWorkbench]:
    """The workbench behind its own service."""
    with lab.connect(url) as bench:
        yield bench
