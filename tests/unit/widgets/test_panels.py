from __future__ import annotations

import threading

import pytest

from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.widgets.budget_panel import BudgetPanel, presets
from autoglm_lab.widgets.dashboard import Dashboard
from autoglm_lab.widgets.kv_panel import limit_steps
from autoglm_lab.widgets.panel import Panel
from tests.unit.widgets.browser import browser_sends, open_view, until

GiB = 1024**3


def module(dashboard, name):
    return next(entry for entry in dashboard.modules.state["modules"] if entry["name"] == name)


def test_an_unknown_keyword_is_an_error_that_names_the_known_ones():
    with pytest.raises(TypeError, match=r"BudgetPanel has no 'colour'; it has .*layout"):
        BudgetPanel(colour="red")


def test_switching_a_module_off_parks_it_and_its_bytes_leave_the_bar(wb, dashboard):
    assert module(dashboard, "audio")["place"] == "device"
    browser_sends(dashboard.modules, "residency", module="audio", residency="off")
    until(lambda: module(dashboard, "audio")["place"] == "disk", "audio to be parked")
    assert wb.policy == MemoryPolicy(modules={"audio": "off"})
    until(lambda: "audio" in [row["name"] for row in dashboard.device_bar.state["beside"]], "audio on disk")
    assert "audio" not in [row["name"] for row in dashboard.device_bar.state["segments"] if row["nbytes"]]


def test_a_module_back_at_its_default_leaves_the_policy(wb, dashboard):
    for residency in ("off", "keep"):
        browser_sends(dashboard.modules, "residency", module="audio", residency=residency)
    until(lambda: not dashboard.modules.busy and wb.modules["audio"].info.place == "device", "audio to be back")
    assert wb.policy == MemoryPolicy()


def test_two_clicks_at_once_both_hold(wb, dashboard):
    browser_sends(dashboard.modules, "residency", module="audio", residency="on-demand")
    browser_sends(dashboard.modules, "residency", module="vision", residency="on-demand")
    browser_sends(dashboard.kv, "set", setting="max_tokens", value=512)
    browser_sends(dashboard.modules, "residency", module="audio", residency="on-demand")
    expected = MemoryPolicy(modules={"audio": "on-demand", "vision": "on-demand"}, kv={"max_tokens": 512})
    until(lambda: wb.policy == expected, "all changes")


def test_park_now_and_wake_now_move_a_module_and_leave_its_residency(wb, dashboard):
    browser_sends(dashboard.modules, "move", module="vision", to="park")
    until(lambda: module(dashboard, "vision")["place"] == "disk", "vision to be parked")
    browser_sends(dashboard.modules, "move", module="vision", to="wake")
    until(lambda: module(dashboard, "vision")["place"] == "device", "vision to be woken")
    assert wb.policy == MemoryPolicy()
    assert module(dashboard, "vision")["last"]["kind"] == "woke"


def test_a_setting_for_all_modules_shows_as_none_when_they_differ(wb, dashboard):
    wb.policy = MemoryPolicy(modules={"audio": {"keep_alive": 5}})
    until(lambda: dashboard.modules.state["keep_alive"] is None, "the mixed setting")
    browser_sends(dashboard.modules, "keep_alive", seconds="12")
    until(lambda: dashboard.modules.state["keep_alive"] == 12, "the shared setting")
    assert {wb.policy.module(name).keep_alive for name in wb.modules} == {12}


def test_a_handler_returns_at_once_while_its_action_is_busy(wb, dashboard):
    go_on = threading.Event()
    dashboard.budget.run("now", go_on.wait)
    until(lambda: dashboard.budget.busy == ["now"], "the panel to show that it is busy")
    go_on.set()
    until(lambda: dashboard.budget.busy == [], "the panel to be free again")


def test_an_impossible_setting_shows_its_error_in_the_panel_until_dismissed(wb, dashboard):
    browser_sends(dashboard.budget, "budget", budget="lots")
    until(lambda: "cannot read 'lots' as a size" in dashboard.budget.problem, "the error")
    assert dashboard.kv.problem == ""
    assert wb.policy.budget is None
    browser_sends(dashboard.budget, "dismiss")
    until(lambda: dashboard.budget.problem == "", "the error to go")


def test_an_unknown_or_broken_message_shows_in_the_panel(dashboard):
    browser_sends(dashboard.kv, "explode")
    until(lambda: dashboard.kv.problem == "this panel does not know 'explode'", "the error")
    browser_sends(dashboard.modules, "residency")
    until(lambda: dashboard.modules.problem == "KeyError: 'module'", "the error")


def test_budget_and_reclaim_settings_reach_the_policy(wb, dashboard):
    browser_sends(dashboard.budget, "budget", budget="8GiB")
    browser_sends(dashboard.budget, "set", setting="every_answers", value=3)
    browser_sends(dashboard.budget, "set", setting="cached_share", value=None)
    expected = MemoryPolicy(budget=8 * GiB, reclaim={"every_answers": 3, "cached_share": None})
    until(lambda: wb.policy == expected, "the settings")
    browser_sends(dashboard.budget, "budget", budget=0)
    until(lambda: wb.policy.budget is None, "the whole device")


def test_reclaim_now_tells_what_it_gave_back(wb, dashboard):
    before = len(wb.events)
    browser_sends(dashboard.budget, "now")
    until(lambda: [event for event in wb.events[before:] if event.kind == "reclaimed"], "the reclaim")
    [event] = [event for event in wb.events[before:] if event.kind == "reclaimed"]
    until(lambda: dashboard.budget.state["last"] == event.nbytes, "the figure")


def test_presets_are_cards_smaller_than_the_device():
    assert presets(24 * GiB) == [4 * GiB, 8 * GiB, 12 * GiB, 16 * GiB]
    assert presets(141 * GiB) == [24 * GiB, 32 * GiB, 48 * GiB, 80 * GiB]
    assert presets(GiB) == []


def test_the_limit_slider_stops_below_the_models_context():
    assert limit_steps(4096) == [64, 128, 256, 512, 1024, 2048]
    assert limit_steps(None)[-1] == 65536


def test_the_export_is_what_would_set_the_same_policy(wb, dashboard):
    wb.policy = MemoryPolicy(modules={"audio": "off"}, budget="8GiB")
    until(lambda: "audio" in dashboard.export.state["yaml"], "the export")
    assert MemoryPolicy.from_yaml(dashboard.export.state["yaml"]) == wb.policy
    assert "lab.load('autoglm-tiny')" in dashboard.export.state["python"]
    assert wb.policy.to_python() in dashboard.export.state["python"]


def test_every_trait_is_written_by_one_thread(wb):
    dashboard, writers = Dashboard(wb), set()
    for panel in dashboard.panels:
        panel.observe(lambda _: writers.add(threading.current_thread().name), ["state", "labels", "busy", "problem"])
    open_view(dashboard)
    browser_sends(dashboard.budget, "budget", budget="lots")
    browser_sends(dashboard.modules, "residency", module="audio", residency="off")
    browser_sends(dashboard.header, "language")
    until(lambda: dashboard.kv.labels["title"] == "KV 缓存", "the language")
    until(lambda: dashboard.budget.problem, "the error")
    dashboard.close()
    assert writers == {"autoglm-lab dashboard"}


def test_every_panel_has_a_browser_side_with_a_default_export(dashboard):
    for panel in dashboard.panels:
        assert isinstance(panel, Panel)
        assert panel._esm.count("export default panel({") == 1
        assert "http://www.w3.org/2000/svg" in panel._esm
        assert panel._esm.count("http") == 1, "nothing is fetched"
