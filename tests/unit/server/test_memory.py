"""`/v1/memory` and `/metrics`: the same figures and switches as beside the notebook."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

import autoglm_lab as lab
from autoglm_lab.engine.protocol import Capabilities, ConversationInfo, ModuleInfo
from autoglm_lab.engine.wire import from_wire
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.memory.planning.plan import Plan
from tests.unit.server.payloads import user


def test_the_ledger_and_what_the_model_can_do_come_through(client: httpx.Client, wb: lab.Workbench) -> None:
    ledger = from_wire(Ledger, client.get("/memory").json())
    assert sum(row.nbytes or 0 for row in ledger.on("device")) == ledger.total == wb.memory.total
    assert ledger.nbytes("vision") == wb.memory.nbytes("vision") > 0
    assert from_wire(Capabilities, client.get("/memory/capabilities").json()) == wb.engine.capabilities
    modules = from_wire(tuple[ModuleInfo, ...], client.get("/memory/modules").json())
    assert [module.name for module in modules] == list(wb.modules)


def test_a_module_is_parked_and_woken(client: httpx.Client, wb: lab.Workbench) -> None:
    parked = from_wire(Event, client.post("/memory/modules/audio/park").json())
    assert (parked.kind, parked.subject, wb.modules["audio"].info.place) == ("parked", "audio", "disk")
    woke = from_wire(Event, client.post("/memory/modules/audio/wake").json())
    assert (woke.kind, wb.modules["audio"].info.place) == ("woke", "device")
    assert client.post("/memory/modules/audio/park", json={"place": "moon"}).status_code == 400
    unknown = client.post("/memory/modules/legs/park")
    assert unknown.status_code == 404 and "vision, audio" in unknown.json()["error"]["message"]
    assert from_wire(Event, client.post("/memory/reclaim").json()).kind == "reclaimed"


def test_the_policy_is_changed_part_by_part(client: httpx.Client, wb: lab.Workbench) -> None:
    client.patch("/memory/policy", json={"kv": {"max_tokens": 512}})
    answer = client.patch("/memory/policy", json={"kv": {"sinks": 8}, "modules": {"audio": "on-demand"}})
    assert wb.policy == lab.MemoryPolicy(kv={"max_tokens": 512, "sinks": 8}, modules={"audio": "on-demand"})
    assert from_wire(lab.MemoryPolicy, answer.json()) == wb.policy
    assert from_wire(lab.MemoryPolicy, client.get("/memory/policy").json()) == wb.policy


@pytest.mark.parametrize("changes", [{"kv": {"max_tokens": 1}}, {"kw": {}}, {"modules": {"legs": "off"}}, {"kv": 5}])
def test_a_policy_that_cannot_be_is_refused_and_nothing_changes(
    client: httpx.Client, wb: lab.Workbench, changes: Any
) -> None:
    response = client.patch("/memory/policy", json=changes)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_setting")
    assert wb.policy == lab.MemoryPolicy()


def test_a_conversation_is_listed_and_forgotten(client: httpx.Client, wb: lab.Workbench) -> None:
    wb.chat("Hi", conversation="my phone/1", max_new_tokens=2).result(60)
    (info,) = from_wire(tuple[ConversationInfo, ...], client.get("/memory/conversations").json())
    assert info == wb.conversations[0]
    assert client.delete("/memory/conversations/my%20phone%2F1").status_code == 204
    assert wb.conversations == ()
    assert client.delete("/memory/conversations/my%20phone%2F1").status_code == 404


def test_a_plan_comes_through(client: httpx.Client, wb: lab.Workbench) -> None:
    body = {"policy": {"modules": {"audio": "off"}}, "workload": {"context": 64, "new_tokens": 8}, "search": False}
    plan = from_wire(Plan, client.post("/memory/plan", json=body).json())
    assert plan.policy.module("audio").residency == "off"
    assert (plan.workload.context, plan.fits, plan.model) == (64, True, "autoglm-tiny")
    too_long = client.post("/memory/plan", json={"workload": {"context": 5000}})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


def test_samples_and_events_come_as_they_happen(client: httpx.Client, wb: lab.Workbench) -> None:
    seen: dict[str, Any] = {}
    with client.stream("GET", "/memory/events", params={"rate": 10}) as response:
        name = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                if name == "sample" and not seen:
                    wb.modules["audio"].park()
                seen[name] = json.loads(line.removeprefix("data: "))
            if "event" in seen:
                break
    assert from_wire(Ledger, seen["sample"]).device == wb.memory.device
    assert from_wire(Event, seen["event"]).kind == "parked"


def test_the_metrics_are_the_ledgers_rows(client: httpx.Client, wb: lab.Workbench) -> None:
    client.post("/chat/completions", json={"messages": [user("Hi")], "max_tokens": 3})
    wb.chat("Hi", conversation="secret name", max_new_tokens=2).result(60)
    text = client.get(str(client.base_url).removesuffix("v1/") + "metrics").text
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    vision = 'autoglm_memory_bytes{kind="weights",name="vision",place="device"}'
    assert values[vision] == wb.memory.nbytes("vision")
    on_device = sum(value for name, value in values.items() if "memory_bytes" in name and 'place="device"' in name)
    assert on_device == pytest.approx(values["autoglm_device_bytes"], rel=1e-3)
    assert values['autoglm_phase{phase="idle"}'] == 1
    assert values["autoglm_conversations"] == 1
    assert values['autoglm_tokens_total{kind="completion"}'] >= 3
    assert "secret name" not in text


def test_health_says_alive_and_ready_says_loaded(client: httpx.Client) -> None:
    root = str(client.base_url).removesuffix("/v1/")
    assert client.get(f"{root}/health").json() == {"status": "ok"}
    assert client.get(f"{root}/ready").json() == {"status": "ready"}


def test_what_is_not_there_is_told_in_openais_shape(client: httpx.Client) -> None:
    for method, path, status in [("GET", "/nothing", 404), ("DELETE", "/models", 405)]:
        response = client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
