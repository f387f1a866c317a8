from __future__ import annotations

import pytest

from autoglm_lab.policy import KvPolicy, MemoryPolicy
from autoglm_lab.widgets.kv_panel import limit_steps, token_limit
from tests.unit.widgets.browser import browser_sends, until

SYSTEM = "You look at the screen of a phone and say briefly what to do next. " * 8


def sets(dashboard, setting, value):
    browser_sends(dashboard.kv, "set", setting=setting, value=value)


def conversation(dashboard, name="main"):
    return next((one for one in dashboard.kv.state["conversations"] if one["name"] == name), None)


@pytest.mark.parametrize(
    ("setting", "value", "kept"),
    [
        ("max_tokens", 512, 512),
        ("max_bytes", "64MiB", 64 << 20),
        ("overflow", "window", "window"),
        ("overflow", "evict", "evict"),
        ("sinks", 32, 32),
        ("observation", 16, 16),
        ("precision", "int4", "int4"),
        ("chunk", 256, 256),
        ("graphs", False, False),
        ("prefix_bytes", "16MiB", 16 << 20),
        ("prefix_host_bytes", "2GiB", 2 << 30),
        ("encoder_bytes", 0, 0),
        ("max_conversations", 3, 3),
    ],
)
def test_every_control_reaches_its_setting_and_no_other(wb, dashboard, setting, value, kept):
    sets(dashboard, setting, value)
    until(lambda: wb.policy != MemoryPolicy(), "the setting")
    assert wb.policy == MemoryPolicy(kv={setting: kept})
    until(lambda: dashboard.kv.state[setting] in (value, str(value)), "the panel to show it")


def test_fewer_tokens_an_image_is_a_setting_beside_the_encoders(wb, dashboard):
    browser_sends(dashboard.kv, "image_tokens", value=64)
    until(lambda: wb.policy == MemoryPolicy(max_image_tokens=64), "the setting")
    until(lambda: dashboard.kv.state["max_image_tokens"] == 64, "the panel to show it")
    told = next(event for event in reversed(wb.events) if event.subject == "max_image_tokens")
    assert told.why == f"max_image_tokens does nothing: fixed at {wb.model.config.image_seq_length} an image"
    browser_sends(dashboard.kv, "image_tokens", value=3)
    until(lambda: "max_image_tokens" in dashboard.kv.problem, "the error")
    browser_sends(dashboard.kv, "image_tokens", value=None)
    until(lambda: wb.policy == MemoryPolicy(), "the setting to go")


def test_an_impossible_size_is_refused_in_words(wb, dashboard):
    sets(dashboard, "max_bytes", "plenty")
    until(lambda: "cannot read 'plenty' as a size" in dashboard.kv.problem, "the error")
    assert wb.policy == MemoryPolicy()


def test_int8_shrinks_a_conversation_as_the_panel_says(wb, dashboard):
    took = {}
    for precision in ("model", "int8"):
        sets(dashboard, "precision", precision)
        until(lambda wanted=precision: dashboard.kv.state["precision"] == wanted, "the precision")
        wb.chat("你是谁?", system=SYSTEM, min_new_tokens=1, max_new_tokens=1).result(60)
        until(lambda: (conversation(dashboard) or {"busy": True})["busy"] is False, "the conversation")
        state, one = dashboard.kv.state, conversation(dashboard)
        took[precision] = one["kv_bytes"]
        pages = -(-one["tokens"] // 16)
        assert one["kv_bytes"] == pages * 16 * state["token_bytes"][precision] == wb.memory.nbytes("KV main")
        wb.drop("main")
    assert took["int8"] <= 0.53 * took["model"]


def test_the_stricter_limit_counts(wb, dashboard):
    page = wb.engine.state.pool.page_bytes
    assert token_limit(KvPolicy(), page) is None
    assert token_limit(KvPolicy(max_tokens=512), page) == 512
    assert token_limit(KvPolicy(max_tokens=512, max_bytes=4 * page + 1), page) == 64
    assert token_limit(KvPolicy(max_tokens=32, max_bytes=4 * page), page) == 32
    assert token_limit(KvPolicy(max_bytes=4 * page), 0) is None, "an engine that tells nothing of pages"
    wb.policy = MemoryPolicy(kv={"max_tokens": 512, "max_bytes": 4 * page})
    until(lambda: dashboard.kv.state["limit"] == 64 == wb.engine.state.kv_limit(), "the panel to agree")


def test_kept_prefixes_and_encoder_outputs_show_beside_their_limits(wb, dashboard):
    wb.chat("你是谁?", system=SYSTEM).result(60)
    assert dashboard.kv.state["prefixes_now"] == 0
    browser_sends(dashboard.kv, "drop", conversation="main")
    until(lambda: dashboard.kv.state["prefixes_now"] > 0, "the prefix")
    assert dashboard.kv.state["prefixes_now"] == wb.memory.nbytes("KV kept prefixes")
    sets(dashboard, "prefix_bytes", 0)
    until(lambda: dashboard.kv.state["prefixes_now"] == 0, "the prefix to go")


def test_what_needs_a_gpu_or_pages_is_told(dashboard):
    assert dashboard.kv.state["gpu"] is False
    assert dashboard.kv.state["paged"] is True


def test_the_limit_slider_stops_below_the_models_context():
    assert limit_steps(4096) == [64, 128, 256, 512, 1024, 2048]
    assert limit_steps(None)[-1] == 65536
