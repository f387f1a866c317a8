"""A picture and a sound to ask about; what they show does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def sound() -> Any:
    return (np.random.default_rng(1).normal(size=20_000) * 0.1).astype(np.float32)
