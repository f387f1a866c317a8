from __future__ import annotations

import threading
import time

import pytest

from autoglm_lab.errors import ModuleError
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger, Row
from autoglm_lab.memory.planning.cards import card_budget
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.widgets.budget_panel import BudgetPanel, cards
from autoglm_lab.widgets.dashboard import Dashboard
from autoglm_lab.widgets.modules_panel import host_copy
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
    until(lambda: "audio" in [row["name"] for row in dashboard.device_bars[0].state["beside"]], "audio on disk")
    assert "audio" not in [row["name"] for row in dashboard.device_bars[0].state["segments"] if row["nbytes"]]


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


def test_another_precision_says_what_the_next_load_would_free(wb, dashboard):
    browser_sends(dashboard.modules, "precision", precision="int4")
    until(lambda: dashboard.modules.state["wanted"] == "int4", "the precision to be looked at")
    state = dashboard.modules.state
    assert 0.7 * module(dashboard, "text")["nbytes"] < state["frees"] < module(dashboard, "text")["nbytes"]
    assert state["precision"] == "model", "nothing changes before the next load"
    assert wb.policy.precisions() == {}
    browser_sends(dashboard.modules, "precision", precision="model")
    until(lambda: dashboard.modules.state["wanted"] == "model", "the precision to be put back")
    assert dashboard.modules.state["frees"] == 0


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


def test_cards_are_those_that_are_smaller_than_the_device_with_what_they_really_offer():
    offered = [(card["gib"], card["budget"]) for card in cards(141 * GiB)]
    assert offered == [(gib, card_budget(gib)) for gib in (8, 12, 16, 24)]
    assert all(budget < gib * GiB for gib, budget in offered)
    assert [card["gib"] for card in cards(15 * GiB)] == [2, 4, 8, 12]
    assert cards(GiB) == []


def test_pretending_to_be_a_card_sets_its_budget_and_tells_what_the_context_takes(wb, dashboard):
    [*_, card] = dashboard.budget.state["cards"]
    browser_sends(dashboard.budget, "budget", budget=card["budget"])
    until(lambda: dashboard.budget.state["budget"] == card["budget"], "the budget")
    assert wb.policy.budget == card["budget"] == wb.memory.budget
    assert dashboard.budget.state["context"] == wb.memory.of_kind("context")
    assert 0 < dashboard.budget.state["context"] < dashboard.budget.state["process"] < card["budget"]


def test_a_budget_that_cannot_be_kept_is_refused_with_what_would_help(wb, dashboard):
    browser_sends(dashboard.budget, "budget", budget="20MiB")
    until(lambda: dashboard.budget.problem, "the refusal")
    assert "a budget of 20.0 MiB is less than what the process must hold" in dashboard.budget.problem
    assert "set a larger one, or keep fewer modules on the device" in dashboard.budget.problem
    assert wb.policy.budget is None


def test_a_move_that_fails_in_the_background_shows_in_the_panel_and_holds_up_no_setting(wb, dashboard, monkeypatch):
    move = Move()
    monkeypatch.setattr(wb.engine, "park", lambda name: move)
    browser_sends(dashboard.modules, "move", module="vision", to="park")
    until(lambda: dashboard.modules.busy == ["move vision"], "the move to be under way")
    browser_sends(dashboard.modules, "residency", module="audio", residency="on-demand")
    until(lambda: wb.policy.module("audio").residency == "on-demand", "the setting, while the move goes on")
    assert dashboard.modules.problem == ""
    move.fail(ModuleError("a variable still views the weights of 'vision'"))
    until(lambda: dashboard.modules.problem == "a variable still views the weights of 'vision'", "the error")
    until(lambda: dashboard.modules.busy == [], "the end")


def test_a_park_by_the_policy_that_failed_shows_at_its_module_until_the_next_move(wb, dashboard):
    assert module(dashboard, "vision")["trouble"] == ""
    wb.sampler.record(Event(time.time(), "note", "vision", why="not parked: the disk is full"))
    until(lambda: module(dashboard, "vision")["trouble"] == "not parked: the disk is full", "the note")
    assert module(dashboard, "audio")["trouble"] == ""
    browser_sends(dashboard.modules, "move", module="vision", to="park")
    until(lambda: module(dashboard, "vision")["trouble"] == "", "the note to go")


@pytest.mark.parametrize(("counts", "kind"), [("host copy, pinned", "pinned"), ("host copy, pageable", "pageable")])
def test_a_host_copy_says_whether_it_is_pinned(counts, kind):
    rows = (Row("vision", "weights", "host", 100, counts), Row("audio", "weights", "host", 0, counts))
    ledger = Ledger("a GPU", 1000, 100, rows, time=0.0)
    assert host_copy(ledger, "vision") == kind
    assert host_copy(ledger, "audio") is host_copy(ledger, "text") is None


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
