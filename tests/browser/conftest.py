"""Chromium, a page that tells of every error in it, and where pictures go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.servers import CHROMIUM, CHROMIUM_FLAGS, NOTEBOOKS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra 'test')")

playwright.expect.set_options(timeout=60_000)

SHOTS = Path(__file__).parent / "screenshots"
DOCS = NOTEBOOKS.parent / "docs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[playwright.Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM} (apt-get install chromium)")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: playwright.Browser) -> Iterator[playwright.Page]:
    """A page of 1280 x 900; an error of our own JavaScript fails the test."""
    errors: list[str] = []
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert not [error for error in errors if "anywidget" in error or "algm" in error], errors


@pytest.fixture
def shoot():
    """Save the dashboard as a picture; with AUTOGLM_LAB_DOCS_SHOTS set, also where README shows it."""

    def save(page: playwright.Page, name: str, docs: bool = False) -> None:
        SHOTS.mkdir(exist_ok=True)
        path = SHOTS / f"{name}.png"
        page.locator(".algm-dashboard").first.screenshot(path=path, animations="disabled")
        assert path.stat().st_size > 20_000, "the picture is empty"
        if docs and os.environ.get("AUTOGLM_LAB_DOCS_SHOTS"):
            DOCS.mkdir(exist_ok=True)
            shutil.copy(path, DOCS / path.name)

    return save
