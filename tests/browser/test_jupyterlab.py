"""Notebook 00 in a real JupyterLab, as a person would use it."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.servers import NOTEBOOKS, jupyterlab

NOTEBOOK = NOTEBOOKS / "00_workbench.ipynb"


def open_notebook(page: Page, url: str, name: str) -> None:
    page.goto(f"{url}/lab/workspaces/test/tree/{name}?reset")
    # JupyterLab asks which kernel to start when cells are run before it has one.
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
    page.keyboard.press("Control+B")


def menu(page: Page, *path: str) -> None:
    page.get_by_role("menuitem", name=path[0], exact=True).first.click()
    for item in path[1:-1]:
        page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{re.escape(item)}$")).hover()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{re.escape(path[-1])}$")).click()


def run_all(page: Page) -> None:
    menu(page, "Run", "Run All Cells")
    expect(page.locator(".algm-module")).to_have_count(4)
    expect(page.locator(".jp-CodeCell").last.locator(".jp-InputArea-prompt")).to_have_text(re.compile(r"\[\d+\]"))


def bytes_of(page: Page, owner: str) -> str:
    """What the legend of the bar says of an owner; empty where it holds nothing on the device."""
    found = page.locator(".algm-device_bar .algm-legend li", has=page.locator(f"span:text-is('{owner}')"))
    return found.locator("b").inner_text() if found.count() else ""


def test_a_person_runs_the_notebook_switches_a_module_off_and_asks_about_a_picture(page, tmp_path, shoot):
    with jupyterlab(tmp_path, NOTEBOOK) as url:
        open_notebook(page, url, NOTEBOOK.name)
        run_all(page)
        assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        dashboard = page.locator(".algm-dashboard")
        dashboard.scroll_into_view_if_needed()
        expect(page.locator(".algm-still")).to_be_hidden()
        expect(page.locator(".algm-pill")).to_contain_text("idle")
        page.set_viewport_size({"width": 1280, "height": 1500})

        # Off: the bytes leave the bar, the panel and the plot say so.
        assert re.fullmatch(r"[\d.]+ MiB", bytes_of(page, "audio"))
        audio = page.locator("[data-module=audio]")
        audio.locator("label[data-value=off]").click()
        expect(audio).to_have_attribute("data-place", "disk")
        expect(page.locator(".algm-device_bar .algm-legend")).to_contain_text(re.compile(r"audio [\d.]+ MiB on disk"))
        assert bytes_of(page, "audio") == ""
        expect(page.locator(".algm-export_panel pre")).to_contain_text("residency: 'off'")

        # A request that needs it is refused in the conversation, and the way out is named.
        chat = page.locator(".algm-chat_panel")
        chat.locator(".algm-sample", has_text="♪").first.click()
        chat.locator(".algm-box").press("Enter")
        expect(chat.locator(".is-error")).to_contain_text("set modules.audio.residency")
        audio.locator("label[data-value=on-demand]").click()
        expect(audio.locator("label[data-value=on-demand] input")).to_be_checked()

        # Shift+Enter makes a new line; it does not run the cell.
        prompts = page.locator(".jp-InputArea-prompt").all_inner_texts()
        chat.locator(".algm-box").fill("one")
        chat.locator(".algm-box").press("Shift+Enter")
        expect(chat.locator(".algm-box")).to_have_value("one\n")
        assert page.locator(".jp-InputArea-prompt").all_inner_texts() == prompts

        # A sample picture in a conversation of its own: one click and Enter.
        chat.get_by_role("button", name="New conversation").click()
        expect(chat.locator(".algm-message")).to_have_count(0)
        chat.locator(".algm-sample", has=page.locator("img")).first.click()
        expect(chat.locator(".algm-tray .algm-chip")).to_have_count(1)
        chat.locator(".algm-box").press("Enter")
        expect(chat.locator(".algm-me img")).to_be_visible()
        answer = chat.locator(".algm-ai:not(.is-error)").last
        expect(answer.locator(".algm-figures").last).to_contain_text("image")
        assert answer.locator(".algm-said").inner_text().strip()

        # The plot has something in it, and tells it to the pointer.
        canvas = page.locator(".algm-canvas")
        canvas.hover(position={"x": 500, "y": 100})
        expect(page.locator(".algm-tip")).to_contain_text("text")
        painted = canvas.evaluate("c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size")
        assert painted > 20
        with page.expect_download() as download:
            page.get_by_role("button", name="Save the picture as PNG").click()
        assert download.value.path().read_bytes().startswith(b"\x89PNG")
        page.mouse.move(0, 0)

        page.wait_for_timeout(5000)
        shoot(page, "dashboard-light", docs=True)
        menu(page, "Settings", "Theme", "JupyterLab Dark")
        expect(page.locator("body[data-jp-theme-light=false]")).to_be_attached()
        page.wait_for_timeout(500)
        shoot(page, "dashboard-dark", docs=True)

        page.get_by_role("button", name="切换到中文").click()
        expect(page.locator(".algm-modules_panel h4")).to_have_text("模块")
        expect(page.locator(".algm-chat_panel h4")).to_have_text("对话")
        shoot(page, "dashboard-zh-dark")
        menu(page, "Settings", "Theme", "JupyterLab Light")
        page.set_viewport_size({"width": 560, "height": 2400})
        page.wait_for_timeout(500)
        shoot(page, "dashboard-narrow")
        wide = dashboard.evaluate("e => e.scrollWidth - e.clientWidth")
        assert wide <= 1, "nothing sticks out on a narrow screen"
        page.set_viewport_size({"width": 1280, "height": 900})

        # A restarted kernel: the dashboard says that it is on its own.
        menu(page, "Kernel", "Restart Kernel…")
        page.locator(".jp-Dialog button", has_text="Restart").click()
        expect(page.locator(".algm-pill")).to_have_text("已断开")
        expect(page.locator(".algm-dashboard.is-down")).to_be_attached()
