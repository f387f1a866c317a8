"""The dashboard in Chromium on a model behind one of the real servers."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra 'test')")

from playwright.sync_api import Page, expect

from tests.browser.conftest import chromium, page  # noqa: F401 - fixtures
from tests.browser.servers import voila
from tests.peer.servers import Server

SOURCE = """\
import autoglm_lab as lab
remote = lab.connect({url!r}, model={model!r})
remote.policy = remote.policy.replace(generation={{"max_new_tokens": 8}})
remote.dashboard()"""


@pytest.fixture
def notebook(server: Server, tmp_path: Path) -> Path:
    made = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(SOURCE.format(url=server.url, model=server.model))]
    )
    made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    path = tmp_path / "remote.ipynb"
    nbformat.write(made, path)
    return path


def test_a_person_chats_and_sees_what_the_server_tells(
    page: Page,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    notebook: Path,
    server: Server,
) -> None:
    with voila(tmp_path_factory.mktemp("voila"), notebook) as url:
        page.goto(url)
        for panel in ("device_bar", "modules_panel", "budget_panel", "plan_panel", "live_plot", "kv_panel"):
            expect(page.locator(f".algm-{panel} .algm-away")).to_contain_text(f"Not available from {server.name}")
        kv = page.locator(".algm-kv_panel .algm-away")
        if server.name == "transformers serve":
            expect(kv).not_to_contain_text("in use")
        else:
            expect(kv).to_contain_text("% of")
            expect(kv).to_contain_text("0 running")
        chat = page.locator(".algm-chat_panel")
        chat.locator(".algm-box").fill("Tell me about the sea.")
        chat.locator(".algm-box").press("Enter")
        answered = chat.locator(".algm-ai")
        expect(answered.locator(".algm-said")).not_to_be_empty()
        expect(answered.locator(".algm-figures").first).to_contain_text("8 new")
