from __future__ import annotations

import gc
import struct
import weakref

import pytest

import autoglm_lab as lab
from autoglm_lab.widgets.dashboard import Dashboard
from tests.unit.widgets.browser import browser_sends, open_view, until


def sent_by(panel, monkeypatch):
    sent = []
    monkeypatch.setattr(panel, "send", lambda content, buffers=None: sent.append((content, buffers)))
    return sent


def test_the_plot_gets_new_samples_as_small_binary_messages(wb, dashboard, monkeypatch):
    sent = sent_by(dashboard.live_plots[0], monkeypatch)
    until(lambda: len([1 for content, _ in sent if content["kind"] == "samples"]) >= 3, "three messages")
    for content, buffers in sent:
        if content["kind"] == "samples":
            count, columns = struct.unpack_from("<II", buffers[0])
            assert len(buffers[0]) == 8 + count * (8 + 4 * columns)
            assert count <= 10
            assert columns - 2 <= len(dashboard.live_plots[0].state["series"])


def test_a_view_that_opens_late_gets_the_history_once_and_the_events(wb, dashboard, monkeypatch):
    until(lambda: len(wb.sampler.samples()) >= 5, "some history")
    wb.reclaim()
    sent = sent_by(dashboard.live_plots[0], monkeypatch)
    browser_sends(dashboard.live_plots[0], "history")
    until(lambda: [content for content, _ in sent if content["kind"] == "events"], "the events")
    [history] = [buffers[0] for content, buffers in sent if content["kind"] == "history"]
    assert struct.unpack_from("<I", history)[0] >= 5
    told = [event["kind"] for content, _ in sent if content["kind"] == "events" for event in content["events"]]
    assert "reclaimed" in told
    count = len(sent)
    until(lambda: len(sent) > count + 2, "more samples")
    assert [content["kind"] for content, _ in sent].count("history") == 1


def test_nothing_is_sent_while_no_one_looks(wb, monkeypatch):
    dashboard = Dashboard(wb)
    sent = sent_by(dashboard.live_plots[0], monkeypatch)
    until(lambda: len(wb.sampler.samples()) >= 5, "samples")
    assert sent == []
    open_view(dashboard)
    until(lambda: sent, "the view to be served")
    dashboard.close()


def test_closing_the_workbench_shows_in_its_dashboards_and_ends_their_threads():
    wb = lab.load("autoglm-tiny")
    dashboard, other = Dashboard(wb), Dashboard(wb)
    open_view(dashboard)
    wb.close()
    until(lambda: dashboard.header.state["closed"] and other.header.state["closed"], "the header to say so", 10)
    until(lambda: not dashboard._refresher._thread.is_alive(), "the thread to end")
    browser_sends(dashboard.modules, "residency", module="audio", residency="off")
    browser_sends(dashboard.chat, "send", text="hello", files=[])
    assert "autoglm-tiny" in dashboard._repr_mimebundle_()["text/html"], "the last state still shows"


def test_closing_a_dashboard_leaves_the_workbench(wb):
    dashboard = Dashboard(wb)
    dashboard.close()
    dashboard.close()
    assert dashboard.header.state["closed"]
    assert wb.chat("你是谁?").result(60).text


def test_a_dashboard_that_no_one_watches_does_not_keep_the_model_alive():
    workbench = lab.load("autoglm-tiny")
    gone, dashboard = weakref.ref(workbench), Dashboard(workbench)
    open_view(dashboard)
    browser_sends(dashboard.header, "view", open=False)
    del workbench
    until(lambda: (gc.collect(), gone() is None)[1], "the workbench to go")
    dashboard.close()


def test_the_language_can_be_chosen_and_turned(wb):
    dashboard = Dashboard(wb, lang="zh")
    assert dashboard.modules.labels["title"] == "模块"
    open_view(dashboard)
    browser_sends(dashboard.header, "language")
    until(lambda: dashboard.modules.labels["title"] == "Modules", "English")
    dashboard.close()
    with pytest.raises(ValueError, match="speaks en and zh"):
        Dashboard(wb, lang="fr")


def test_the_bundle_has_a_view_a_page_and_the_same_plain_text_every_time(wb, dashboard):
    bundle, again = dashboard._repr_mimebundle_(), Dashboard(wb)
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == dashboard.widget.model_id
    assert bundle["text/plain"] == "Dashboard of autoglm-tiny (vision, audio, projector, text)" == repr(again)
    assert "<table>" in bundle["text/html"]
    again.close()


def test_the_bar_covers_the_whole_device(dashboard):
    state = dashboard.device_bars[0].state
    assert sum(segment["nbytes"] for segment in state["segments"]) == state["total"]
    assert [segment["scope"] for segment in state["segments"]] == sorted(
        (segment["scope"] for segment in state["segments"]), key=["model", "process", "device"].index
    )
