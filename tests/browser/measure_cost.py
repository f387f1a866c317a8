"""What sampling and drawing cost: ``python -m tests.browser.measure_cost [SECONDS]``.

Opens the dashboard in JupyterLab in Chromium, waits, and prints the kernel's processor time (all threads, and those of
the sampler and the dashboard) and the browser's, as shares of one core.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from playwright.sync_api import expect, sync_playwright

from tests.browser.servers import CHROMIUM, CHROMIUM_FLAGS, jupyterlab
from tests.browser.test_jupyterlab import menu, open_notebook

_KERNEL = """
import collections, json, pathlib, threading, time
import psutil

def threads():
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    spent = collections.Counter()
    for thread in psutil.Process().threads():
        spent[names.get(thread.id, "other")] += thread.user_time + thread.system_time
    return spent

def measure():
    time.sleep(5)
    before, all_before, began = threads(), time.process_time(), time.monotonic()
    time.sleep(SECONDS)
    wall = time.monotonic() - began
    figures = {name: (spent - before[name]) / wall for name, spent in threads().items()}
    figures["all threads"] = (time.process_time() - all_before) / wall
    pathlib.Path("cost.json").write_text(json.dumps(figures))

threading.Thread(target=measure, daemon=True).start()
"""


def main(seconds: int) -> None:
    cells = [
        'import autoglm_lab as lab\nwb = lab.load("autoglm-tiny")\nwb.dashboard()',
        _KERNEL.replace("SECONDS", str(seconds)),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as source, sync_playwright() as play:
        folder, path = Path(name), Path(source) / "cost.ipynb"
        nbformat.write(notebook, path)
        with jupyterlab(folder, path) as url:
            browser = play.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 1500})
            expect.set_options(timeout=60_000)
            open_notebook(page, url, path.name)
            menu(page, "Run", "Run All Cells")
            expect(page.locator(".algm-module")).to_have_count(4)
            page.locator(".algm-dashboard").scroll_into_view_if_needed()
            page.wait_for_timeout(5000)
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable")
            before, began = _tasks(session), time.monotonic()
            page.wait_for_timeout(1000 * seconds)
            drawn = (_tasks(session) - before) / (time.monotonic() - began)
            page.wait_for_timeout(6000)
            figures = json.loads((folder / "cost.json").read_text())
            browser.close()
    lines = [(share, f"kernel: {thread}") for thread, share in figures.items() if share >= 0.0001]
    for share, whose in [*sorted(lines, reverse=True), (drawn, "browser: every task of the page")]:
        sys.stdout.write(f"{100 * share:6.2f} % of a core  {whose}\n")


def _tasks(session: object) -> float:
    metrics = session.send("Performance.getMetrics")["metrics"]  # type: ignore[attr-defined]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
