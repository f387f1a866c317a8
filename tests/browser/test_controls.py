"""The memory controls of the dashboard, as a person turns them."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.servers import NOTEBOOKS, voila

NOTEBOOK = NOTEBOOKS / "00_workbench.ipynb"
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20}


def nbytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


def ask_anew(page: Page, question: str) -> str:
    """Ask in a conversation of its own; its name."""
    chat = page.locator(".algm-chat_panel")
    chat.get_by_role("button", name="New conversation").click()
    expect(chat.locator(".algm-message")).to_have_count(0)
    chat.locator(".algm-box").fill(question)
    chat.locator(".algm-box").press("Enter")
    expect(chat.locator(".algm-ai .algm-phases").last).to_contain_text("decode +")
    return chat.locator("select").input_value()


def taken(page: Page, conversation: str) -> tuple[int, float]:
    """Tokens of a finished conversation as the KV panel says, and the bytes of its row in the ledger.

    Both panels show what was there a moment ago, each at its own time: the row has come to rest when they agree.
    """
    line = page.locator(f"[data-conversation='{conversation}'] .algm-num").first
    expect(line).to_contain_text("KiB")
    row = page.locator(".algm-device_bar .algm-legend li", has=page.locator(f"span:text-is('KV {conversation}')"))
    for _ in range(100):
        tokens, size = line.inner_text().split(" · ")
        if row.locator("b").inner_text() == size:
            break
        page.wait_for_timeout(100)
    assert row.locator("b").inner_text() == size
    return int(tokens.split(" tok")[0].replace(",", "")), nbytes(size)


def test_a_person_quantises_slides_pretends_and_is_told_what_would_help(page, tmp_path, shoot):
    with voila(tmp_path, NOTEBOOK) as url:
        page.goto(url)
        expect(page.locator(".algm-module")).to_have_count(4)
        page.set_viewport_size({"width": 1280, "height": 1700})
        kv, budget = page.locator(".algm-kv_panel"), page.locator(".algm-budget_panel")
        policy = page.locator(".algm-export_panel pre")

        # int8: the ledger's row of the same question shrinks, and the panel calls it lossy. Only what a conversation
        # has for itself is its row, so nothing is shared here.
        kv.get_by_label("Keep the KV of a conversation between its turns").uncheck()
        expect(policy).to_contain_text("reuse: false")
        tokens, before = taken(page, ask_anew(page, "你是谁?"))
        expect(kv.locator(".algm-lossy:visible")).to_have_count(0)
        kv.locator("label[data-value=int8]").click()
        expect(policy).to_contain_text("precision: int8")
        expect(kv.locator(".algm-lossy:visible")).to_have_count(1)
        expect(kv.locator("[data-cost=precision]")).to_contain_text("SmolLM2 perplexity +0.074 %")
        after_tokens, after = taken(page, ask_anew(page, "你是谁?"))
        pages = [-(-count // 16) for count in (tokens, after_tokens)]
        assert after / pages[1] <= 0.53 * before / pages[0]

        # The window shows what it never forgets.
        kv.locator("label[data-value=window]").click()
        expect(policy).to_contain_text("overflow: window")
        expect(kv.locator(".algm-sinks:visible")).to_have_value("64")
        expect(kv.locator(".algm-lossy:visible")).to_have_count(2)

        # The rest is folded away; what this machine cannot do says why.
        kv.locator("summary").click()
        expect(kv.get_by_text("no GPU: the device is the host")).to_be_visible()
        kv.get_by_label("Bytes for what the encoders gave").fill("16MiB")
        kv.get_by_label("Bytes for what the encoders gave").press("Enter")
        expect(policy).to_contain_text("encoder_bytes: 16MiB")
        shoot(page, "dashboard-controls")

        # A card tells what it really offers; a budget that cannot be kept is refused, with what would help.
        cards = budget.locator(".algm-segmented").first
        cards.locator("label").first.click()
        expect(budget.locator(".algm-left")).to_contain_text(re.compile(r"context takes [\d.]+ MiB, leaves"))
        expect(budget.locator(".algm-left")).to_contain_text("still free")
        budget.get_by_label("Budget", exact=True).fill("20MiB")
        budget.get_by_label("Budget", exact=True).press("Enter")
        expect(budget.locator(".algm-problem")).to_contain_text("less than what the process must hold")
        expect(budget.locator(".algm-problem")).to_contain_text("keep fewer modules on the device")
        cards.locator("label", has_text="all").click()
        expect(policy).not_to_contain_text("budget")

        # What happened is listed.
        events = page.locator(".algm-events li")
        expect(events.filter(has_text="budget").first).to_be_visible()
        budget.get_by_role("button", name="Give unused memory back").click()
        expect(events.first).to_contain_text(re.compile(r"reclaimed.*gained [\d.]+ (B|[KM]iB)"))
