"""A workbench whose model is behind a server of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import autoglm_lab as lab
from autoglm_lab.engine.protocol import MemoryEvent
from autoglm_lab.errors import (
    AdmissionError,
    ContextLimitError,
    ConversationError,
    EndpointError,
    ModuleError,
    PolicyError,
)
from autoglm_lab.serving import serve
from autoglm_lab.units import MiB
from autoglm_lab.widgets.dashboard import Dashboard
from tests.unit.engine import peers
from tests.unit.widgets.browser import browser_sends, open_view, until


def test_it_answers_as_the_model_itself(wb: lab.Workbench, remote: lab.RemoteWorkbench, picture: Any) -> None:
    asked: list[dict[str, Any]] = [
        {"text": "你是谁?"},
        {"text": "What is this?", "image": picture, "thinking": True},
        {"text": "And now?"},
    ]
    there = [remote.chat(**one, max_new_tokens=12).result(60) for one in asked]
    here = [wb.chat(**one, max_new_tokens=12, conversation="here").result(60) for one in asked]
    assert [(one.text, one.reasoning, one.finish_reason) for one in there] == [
        (one.text, one.reasoning, one.finish_reason) for one in here
    ]
    assert [one.usage.prompt_tokens for one in there] == [one.usage.prompt_tokens for one in here]
    assert there[1].usage.image_tokens == here[1].usage.image_tokens > 0
    assert there[1].usage.cached_tokens > 0 and "decode" in there[1].peak_bytes


def test_the_sound_that_is_heard_is_the_one_that_was_sent(
    wb: lab.Workbench, remote: lab.RemoteWorkbench, sound: Any
) -> None:
    there = remote.chat("What do you hear?", audio=sound, max_new_tokens=12).result(60)
    here = wb.chat("What do you hear?", audio=sound, max_new_tokens=12, conversation="here").result(60)
    assert there.text == here.text and there.usage.audio_tokens == here.usage.audio_tokens > 0


def test_modules_are_parked_and_woken(wb: lab.Workbench, remote: lab.RemoteWorkbench) -> None:
    event = remote.modules["audio"].park()
    assert (event.kind, event.subject) == ("parked", "audio")
    assert wb.modules["audio"].info.place == remote.modules["audio"].info.place == "disk"
    assert remote.modules["audio"].wake().kind == "woke"
    assert repr(wb.modules) == repr(remote.modules)
    with pytest.raises(ModuleError, match="has no module 'nose'; its modules are vision, audio, projector, text"):
        remote.engine.park("nose")


def test_a_module_that_a_turn_wakes_is_told_with_the_turn(remote: lab.RemoteWorkbench, picture: Any) -> None:
    remote.policy = remote.policy.replace(modules={"vision": "on-demand"})
    remote.modules["vision"].park()
    turn = remote.chat("What is this?", image=picture, max_new_tokens=2)
    turn.result(60)
    assert [(one.event.kind, one.event.subject) for one in turn if isinstance(one, MemoryEvent)] == [("woke", "vision")]


def test_settings_reach_the_server_and_go_back_to_their_defaults(
    wb: lab.Workbench, remote: lab.RemoteWorkbench
) -> None:
    remote.policy = lab.MemoryPolicy(kv={"max_tokens": 256}, modules={"audio": "off"}, generation={"max_new_tokens": 3})
    assert wb.policy.kv.max_tokens == 256 and wb.policy.module("audio").residency == "off"
    assert remote.policy == wb.policy
    assert remote.chat("hello").result(60).usage.completion_tokens == 3
    remote.policy = lab.MemoryPolicy()
    assert wb.policy.kv.max_tokens is None and wb.policy.module("audio").residency == "keep"


def test_what_the_server_refuses_is_the_same_error(remote: lab.RemoteWorkbench, sound: Any) -> None:
    with pytest.raises(PolicyError, match="has no module 'nose'"):
        remote.policy = remote.policy.replace(modules={"nose": "off"})
    remote.policy = remote.policy.replace(modules={"audio": "off"}, kv={"max_tokens": 32, "overflow": "refuse"})
    with pytest.raises(ModuleError, match="which the policy keeps off"):
        remote.chat("hello", audio=sound).result(60)
    with pytest.raises(ContextLimitError):
        remote.chat("hello " * 60).result(60)
    with pytest.raises(ConversationError, match="there is no conversation 'x'"):
        remote.drop("x")


def test_the_ledger_is_the_servers(wb: lab.Workbench, remote: lab.RemoteWorkbench) -> None:
    ledger = remote.memory
    assert ledger.total == wb.memory.total
    assert ledger.nbytes("text") == wb.memory.nbytes("text") > 0
    assert remote.plan(workload=lab.Workload(128, 16)).verdict == wb.plan(None, lab.Workload(128, 16)).verdict
    assert remote.reclaim().kind == "reclaimed"


def test_samples_and_events_come_by_themselves(wb: lab.Workbench, remote: lab.RemoteWorkbench) -> None:
    until(lambda: remote.sampler.latest is not None, "a sample")
    until(lambda: any(event.kind == "loaded" for event in remote.events), "events from before the connection")
    wb.modules["audio"].park()
    until(lambda: any(event.kind == "parked" for event in remote.events), "the event of a park")


def test_conversations_have_their_names_on_the_server(wb: lab.Workbench, remote: lab.RemoteWorkbench) -> None:
    remote.chat("hello", conversation="tea", max_new_tokens=2).result(60)
    assert [info.name for info in wb.conversations] == [info.name for info in remote.conversations] == ["tea"]
    remote.drop("tea")
    assert wb.conversations == remote.conversations == ()


def test_a_client_without_the_admin_key_can_chat_but_not_change(wb: lab.Workbench) -> None:
    with (
        serve(wb, port=0, api_key="client", admin_key="admin") as service,
        lab.connect(service.url, api_key="client") as client,
        lab.connect(service.url, api_key="admin") as admin,
    ):
        assert client.chat("hello " * 20, max_new_tokens=2).result(60).finish_reason == "length"
        assert client.chat("again", max_new_tokens=2).result(60).usage.prompt_tokens > 40  # the history went along
        with pytest.raises(EndpointError, match=r"refused POST /v1/memory/modules/audio/park: .*the admin key"):
            client.modules["audio"].park()
        assert admin.modules["audio"].park().kind == "parked"


# what does not fit


def refuse(wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the plan find that no question fits."""

    def check(*_: Any, force: bool, **__: Any) -> None:
        if not force:
            raise AdmissionError("prefill", 9 * MiB, 2 * MiB, ["shorten the prompt"])

    monkeypatch.setattr(wb.engine.state.admission, "check", check)


def test_what_cannot_fit_is_refused_as_it_would_be_here_and_tried_if_it_must(
    wb: lab.Workbench, remote: lab.RemoteWorkbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(wb, monkeypatch)
    with pytest.raises(AdmissionError) as caught:
        remote.chat("hello").result(60)
    error = caught.value
    assert (error.phase, error.needed, error.had) == ("prefill", 9 * MiB, 2 * MiB)
    assert error.remedies == ("shorten the prompt",)
    assert str(error).endswith("What would fit: shorten the prompt. force=True tries it all the same")
    assert remote.chat("hello", force=True, max_new_tokens=2).result(60).usage.completion_tokens == 2
    assert remote.conversations[0].turns == 1


def test_what_was_refused_is_sent_anyway_from_a_remote_dashboard(
    wb: lab.Workbench, remote: lab.RemoteWorkbench, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard = shown(remote)
    refuse(wb, monkeypatch)
    browser_sends(dashboard.chat, "send", text="你是谁?", files=[])
    until(lambda: dashboard.chat.state.get("refused"), "the refusal")
    assert dashboard.chat.state["can_force"]
    browser_sends(dashboard.chat, "again")
    until(lambda: any("AutoGLM" in one["text"] for one in dashboard.chat.messages), "the answer")


def test_only_the_admin_may_force(wb: lab.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(wb, monkeypatch)
    with (
        serve(wb, port=0, api_key="client", admin_key="admin") as service,
        lab.connect(service.url, api_key="client") as client,
        lab.connect(service.url, api_key="admin") as admin,
    ):
        with pytest.raises(EndpointError, match=r"'force' tries what does not fit, .*: send the admin key"):
            client.chat("hello", force=True).result(60)
        assert admin.chat("hello", force=True, max_new_tokens=2).result(60).usage.completion_tokens == 2


def test_an_image_is_counted_before_it_is_sent(wb: lab.Workbench, remote: lab.RemoteWorkbench, picture: Any) -> None:
    assert remote.image_tokens(picture) == wb.image_tokens(picture) == remote.image_tokens((320, 480)) == 49


@pytest.fixture
def shown(wb: lab.Workbench) -> Iterator[Callable[[lab.RemoteWorkbench], Dashboard]]:
    opened: list[Dashboard] = []

    def show(bench: lab.RemoteWorkbench, lang: str = "en") -> Dashboard:
        opened.append(Dashboard(bench, lang=lang))
        open_view(opened[-1])
        return opened[-1]

    yield show
    for dashboard in opened:
        dashboard.close()


def test_the_dashboard_works_from_afar(wb: lab.Workbench, remote: lab.RemoteWorkbench, shown: Any) -> None:
    until(lambda: remote.sampler.latest is not None, "a sample")
    dashboard = shown(remote)
    until(lambda: dashboard.modules.state.get("modules"), "the modules")
    assert dashboard.kv.state["paged"] and dashboard.kv.state["token_bytes"]
    browser_sends(dashboard.modules, "move", module="audio", to="park")
    until(lambda: wb.modules["audio"].info.place == "disk", "the park")
    browser_sends(dashboard.kv, "set", setting="max_tokens", value=512)
    until(lambda: wb.policy.kv.max_tokens == 512, "the limit")
    browser_sends(dashboard.chat, "send", text="你是谁?", files=[])
    until(lambda: any(one["role"] == "assistant" for one in dashboard.chat.messages), "the answer")
    assert "AutoGLM" in dashboard.chat.messages[-1]["text"]
    until(lambda: dashboard.plan.state.get("verdict"), "the plan")
    assert [panel.name for panel in dashboard.panels if panel.problem] == []


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_dashboard_says_what_another_server_does_not_tell(lang: str, shown: Any) -> None:
    server = peers.PeerServer(peers.vllm())
    with lab.connect(server.peer.url) as bench:
        dashboard = shown(bench, lang)
        until(lambda: dashboard.kv.state.get("facts"), "the metrics")
        absent = {panel.name for panel in dashboard.panels if panel.state.get("absent") == "vLLM"}
        assert absent == {"device_bar", "modules_panel", "kv_panel", "budget_panel", "plan_panel", "live_plot"}
        assert dashboard.kv.state["facts"] == [
            ["load kv", {"share": "25"}],
            ["load capacity", {"n": "8,000"}],
            ["load running", {"n": "2"}],
            ["load waiting", {"n": "1"}],
            ["load hits", {"share": "60"}],
        ]
        words = dashboard.kv.labels
        assert words["absent"].format(server="vLLM") in ("Not available from vLLM", "vLLM 不提供此信息")
        assert all(label in words for label, _ in dashboard.kv.state["facts"])
        browser_sends(dashboard.chat, "send", text="hello", files=[])
        until(lambda: any(one["role"] == "assistant" for one in dashboard.chat.messages), "the answer")
        assert dashboard.chat.messages[-1]["text"] == "Hello there"
        assert "not available from vLLM" in dashboard._repr_mimebundle_()["text/html"]
        assert [panel.name for panel in dashboard.panels if panel.problem] == []
        dashboard.close()
    server.close()
