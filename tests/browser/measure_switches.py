"""How soon the plan follows a switch: ``python -m tests.browser.measure_switches [TIMES]``.

Opens the dashboard in Voila in Chromium, lets the engine rest, turns each switch to and fro, and prints how long it
took from the click until the planned bytes stood on the page, drawn: the median and the longest.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.servers import CHROMIUM, CHROMIUM_FLAGS, NOTEBOOKS, voila

REST_MS = 20_000
"""In which what a person is likely to try next is traced."""
_SLIDER = "i => { i.value = {at}; i.dispatchEvent(new Event('input')); i.dispatchEvent(new Event('change')); }"
_CLICK = "i => i.click()"
# What is turned, the plan's row that follows, and how it is turned one way and the other.
SWITCHES: list[tuple[str, str, tuple[tuple[str, str], tuple[str, str]]]] = [
    (
        "conversations, 16 and 1",
        "KV",
        tuple((".algm-plan_panel label:nth-child(3) input", _SLIDER.replace("{at}", at)) for at in ("15", "0")),
    ),
    (
        "keys and values, int8 and as the model's",
        "KV",
        tuple((f".algm-kv_panel label[data-value={one}] input", _CLICK) for one in ("int8", "model")),
    ),
    (
        "the vision encoder, off and kept",
        "vision",
        tuple(
            (f".algm-module [aria-label^='vision:'] label[data-value={one}] input", _CLICK) for one in ("off", "keep")
        ),
    ),
]
_TURN = """
([selector, act, row]) => {
  const panel = document.querySelector(".algm-plan_panel");
  const read = () => [...panel.querySelectorAll(".algm-legend li")]
    .filter((li) => li.children[1]?.textContent === row).map((li) => li.querySelector("b").textContent).join();
  const before = read(), turned = document.querySelector(selector), began = performance.now();
  return new Promise((resolve) => {
    const watch = new MutationObserver(() => {
      if (read() === before) return;
      watch.disconnect();
      requestAnimationFrame(() => resolve(performance.now() - began));
    });
    watch.observe(panel, { childList: true, subtree: true, characterData: true });
    setTimeout(() => resolve(null), 10000);
    eval(act)(turned);
  });
}
"""


def turn(page: Page, selector: str, act: str, row: str) -> float:
    """Milliseconds from one click to the plan's new figure."""
    took = page.evaluate(_TURN, [selector, act, row])
    assert took is not None, f"{selector} changed nothing in the plan's row {row!r}"
    page.wait_for_timeout(1000)
    return float(took)


def main(times: int) -> None:
    with (
        tempfile.TemporaryDirectory() as name,
        sync_playwright() as play,
        voila(Path(name), NOTEBOOKS / "00_workbench.ipynb") as url,
    ):
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        expect.set_options(timeout=60_000)
        page.goto(url)
        expect(page.locator(".algm-module")).to_have_count(4)
        expect(page.locator(".algm-plan_panel .algm-verdict")).to_contain_text("to spare")
        page.wait_for_timeout(REST_MS)
        for what, row, ways in SWITCHES:
            took = [turn(page, selector, act, row) for _ in range(times) for selector, act in ways]
            sys.stdout.write(f"{what}: {statistics.median(took):.0f} ms, at most {max(took):.0f} ms\n")
        browser.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
