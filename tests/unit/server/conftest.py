"""One service of the embedded model for all tests; what a test changes is undone by `wb`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import autoglm_lab as lab
from autoglm_lab.server.run import Serving
from autoglm_lab.serving import serve


@pytest.fixture(scope="session")
def served(loaded: lab.Workbench) -> Iterator[Serving]:
    with serve(loaded, port=0) as service:
        yield service


@pytest.fixture
def client(wb: lab.Workbench, served: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as opened:
        yield opened


@pytest.fixture
def another(wb: lab.Workbench) -> Iterator[Callable[..., httpx.Client]]:
    """Starts a service of the same workbench with other settings, and gives a client of it."""
    opened: list[Any] = []

    def start(**settings: Any) -> httpx.Client:
        service = serve(wb, port=0, **settings)
        found = httpx.Client(base_url=service.url, timeout=60)
        opened.extend([found.close, service.stop])
        return found

    yield start
    for close in opened:
        close()
