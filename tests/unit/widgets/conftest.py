"""A dashboard on the embedded model that someone watches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import autoglm_lab as lab
from autoglm_lab.widgets import transcript
from autoglm_lab.widgets.dashboard import Dashboard
from tests.unit.widgets.browser import open_view


@pytest.fixture
def wb(wb: lab.Workbench) -> Iterator[lab.Workbench]:
    """The workbench as it was loaded, and no chat shown."""
    yield wb
    transcript._transcripts.clear()


@pytest.fixture
def dashboard(wb: lab.Workbench) -> Iterator[Dashboard]:
    dashboard = Dashboard(wb)
    open_view(dashboard)
    yield dashboard
    dashboard.close()
