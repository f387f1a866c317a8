"""Notebook 00 as an app."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.browser.servers import NOTEBOOKS, voila

NOTEBOOK = NOTEBOOKS / "00_workbench.ipynb"

_GIVE = """async (target, how) => {
    const canvas = new OffscreenCanvas(64, 32);
    canvas.getContext("2d").fillRect(0, 0, 32, 32);
    const data = new DataTransfer();
    data.items.add(new File([await canvas.convertToBlob()], `${how}.png`, { type: "image/png" }));
    const given = { bubbles: true, cancelable: true };
    if (how === "drop") target.dispatchEvent(new DragEvent("drop", { ...given, dataTransfer: data }));
    else target.dispatchEvent(new ClipboardEvent("paste", { ...given, clipboardData: data }));
}"""
"""Hands a small picture to an element, by dropping or by pasting."""


def test_the_notebook_is_an_app(page, tmp_path, shoot):
    with voila(tmp_path, NOTEBOOK) as url:
        page.goto(url)
        expect(page.locator(".algm-module")).to_have_count(4)
        expect(page.locator(".algm-still")).to_be_hidden()
        page.locator("[data-module=vision] label[data-value=on-demand]").click()
        expect(page.locator(".algm-export_panel pre")).to_contain_text("residency: on-demand")
        # What the cells below asked is there already.
        expect(page.locator(".algm-ai .algm-figures")).to_have_count(3)
        page.locator(".algm-box").fill("你是谁?")
        page.locator(".algm-box").press("Enter")
        expect(page.locator(".algm-ai .algm-figures")).to_have_count(4)
        expect(page.locator(".algm-ai .algm-figures").last).to_contain_text("tok/s")
        # Pictures can be dropped and pasted too.
        page.locator(".algm-chat").evaluate(_GIVE, "drop")
        page.locator(".algm-box").evaluate(_GIVE, "paste")
        expect(page.locator(".algm-tray .algm-chip")).to_have_count(2)
        page.get_by_role("button", name="Remove drop.png").click()
        expect(page.locator(".algm-tray .algm-chip")).to_have_count(1)
        page.locator(".algm-go").click()
        expect(page.locator(".algm-me figure").last).to_contain_text("paste.png · 64×32")
        expect(page.locator(".algm-ai .algm-figures")).to_have_count(5)
        expect(page.locator(".algm-ai .algm-figures").last).to_contain_text("image")
        page.set_viewport_size({"width": 1280, "height": 1500})
        shoot(page, "voila")
