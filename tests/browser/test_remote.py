"""The dashboard on a model behind an endpoint: all of it on a server of ours, what there is on another."""

from __future__ import annotations

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.servers import voila
from tests.unit.engine import peers

SERVED = """\
import autoglm_lab as lab
wb = lab.load("autoglm-tiny", device="cpu")
service = lab.serve(wb, port=0)
remote = lab.connect(service.url)
remote.dashboard()"""


@pytest.fixture
def notebook(tmp_path_factory):
    """Writes a notebook of one cell."""

    def written(source):
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
        path = tmp_path_factory.mktemp("written") / "remote.ipynb"
        nbformat.write(made, path)
        return path

    return written


def test_a_person_chats_with_vllm_and_sees_what_it_does_not_tell(page, tmp_path, notebook, shoot):
    server = peers.PeerServer(peers.vllm())
    path = notebook(f"import autoglm_lab as lab\nremote = lab.connect({server.peer.url!r})\nremote.dashboard()")
    with voila(tmp_path, path) as url:
        page.goto(url)
        page.set_viewport_size({"width": 1280, "height": 1200})
        kv = page.locator(".algm-kv_panel .algm-away")
        expect(kv).to_contain_text("Not available from vLLM")
        expect(kv).to_contain_text("KV cache: 25 % in use")
        for panel in ("device_bar", "modules_panel", "budget_panel", "plan_panel", "live_plot"):
            expect(page.locator(f".algm-{panel} .algm-away")).to_contain_text("Not available from vLLM")
        expect(page.locator(".algm-budget_panel input").first).to_be_hidden()
        chat = page.locator(".algm-chat_panel")
        chat.locator(".algm-box").fill("hello")
        chat.locator(".algm-box").press("Enter")
        expect(chat).to_contain_text("Hello there")
        shoot(page, "dashboard-vllm")
        page.get_by_role("button", name="中文").or_(page.locator(".algm-header button").first).first.click()
        expect(kv).to_contain_text("vLLM 不提供此信息")
    server.close()


def test_a_person_parks_a_module_of_a_server(page, tmp_path, notebook):
    with voila(tmp_path, notebook(SERVED)) as url:
        page.goto(url)
        expect(page.locator(".algm-module")).to_have_count(4)
        audio = page.locator('.algm-module[data-module="audio"]')
        expect(audio).to_have_attribute("data-place", "device")
        audio.get_by_role("button").click()
        expect(audio).to_have_attribute("data-place", "disk")
        expect(page.locator(".algm-events_panel")).to_contain_text("audio")
        expect(page.locator(".algm-away:visible")).to_have_count(0)
