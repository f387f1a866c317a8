"""The tier that needs a CUDA device: every test here is skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from autoglm_lab.memory.accelerator import Accelerator, open_accelerator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="there is no CUDA device here")
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(missing)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    opened = open_accelerator("cuda")
    yield opened
    opened.set_budget(None)
    opened.give_back()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


def free() -> int:
    """Bytes of the device that are free once it has done what it was given."""
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])
