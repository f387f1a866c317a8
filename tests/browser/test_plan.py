"""The plan in the dashboard: told before it is tried, and made to fit with one click."""

from __future__ import annotations

import re
import time

from playwright.sync_api import expect

from tests.browser.servers import NOTEBOOKS, voila

NOTEBOOK = NOTEBOOKS / "00_workbench.ipynb"


def test_a_person_sees_that_it_does_not_fit_and_applies_what_makes_it_fit(page, tmp_path, shoot):
    with voila(tmp_path, NOTEBOOK) as url:
        page.goto(url)
        expect(page.locator(".algm-module")).to_have_count(4)
        page.set_viewport_size({"width": 1280, "height": 1500})
        plan, chat = page.locator(".algm-plan_panel"), page.locator(".algm-chat_panel")
        policy = page.locator(".algm-export_panel pre")
        verdict = plan.locator(".algm-verdict")
        expect(verdict).to_contain_text(re.compile(r"^fits.*to spare$"))
        expect(chat.locator(".algm-warning")).to_be_hidden()

        # More conversations need more, and the predicted bar says so. The process itself is no steady ground while what
        # will be asked next is traced: then its two readings are of different moments.
        bars = plan.locator(".algm-plan-bars > b")
        conversations = plan.get_by_label("Conversations kept at the same time")
        kv = plan.locator(".algm-legend li", has=page.locator("span:text-is('KV')"))
        deadline = time.monotonic() + 60
        while True:
            conversations.press("Home")
            expect(plan.locator("output").last).to_have_text("1")
            expect(kv).to_contain_text(re.compile(r"KV\d\.\d+ MiB"))
            few = mebibytes(bars.first.inner_text())
            conversations.press("End")
            expect(plan.locator("output").last).to_have_text("16")
            expect(kv).to_contain_text(re.compile(r"KV9\d\.\d MiB"))
            many, now = (mebibytes(bar.inner_text()) for bar in bars.all())
            if many > few + 80:
                break
            assert time.monotonic() < deadline, f"{few} MiB for one conversation, {many} MiB for 16"

        # A budget between what they need and what is held: told before anything is sent.
        budget = page.locator(".algm-budget_panel").get_by_label("Budget", exact=True)
        budget.fill(f"{(max(now, few) + many) / 2:.0f}MiB")
        budget.press("Enter")
        expect(verdict).to_contain_text(re.compile(r"^does not fit as set.*missing$"))
        expect(chat.locator(".algm-warning")).to_contain_text(re.compile(r"The plan: [\d.]+ MiB missing in"))
        best = plan.locator(".algm-alternative[data-fits=true]").first
        expect(best).to_contain_text("lossy")
        shoot(page, "dashboard-plan")

        # One click later it fits, and the policy says what changed.
        change = best.locator("code").inner_text()
        best.get_by_role("button").click()
        expect(verdict).to_contain_text(re.compile(r"^fits.*to spare$"))
        expect(chat.locator(".algm-warning")).to_be_hidden()
        expect(plan.locator(".algm-alternative")).to_have_count(0)
        expect(policy).to_contain_text("kv:")
        assert re.search(r"kv\.(\w+)=", change)[1] in policy.inner_text()


def mebibytes(text: str) -> float:
    return float(text.removesuffix(" MiB"))
