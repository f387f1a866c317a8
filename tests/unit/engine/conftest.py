"""The embedded model under the local engine, loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

import autoglm_lab as lab


@pytest.fixture(scope="session")
def loaded() -> Iterator[lab.Workbench]:
    with lab.load("autoglm-tiny", device="cpu") as workbench:
        yield workbench


@pytest.fixture
def wb(loaded: lab.Workbench) -> Iterator[lab.Workbench]:
    """The workbench as it was loaded: default policy, no conversation."""
    yield loaded
    loaded.stop()
    loaded.policy = lab.MemoryPolicy()
    for info in loaded.conversations:
        loaded.drop(info.name)


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def sound() -> Any:
    return (np.random.default_rng(1).normal(size=20_000) * 0.1).astype(np.float32)
