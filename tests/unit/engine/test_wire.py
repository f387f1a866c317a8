from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.engine.protocol import Answer, Capabilities, ConversationInfo, ModuleInfo, Timings, Usage
from autoglm_lab.engine.wire import from_wire, to_wire
from autoglm_lab.errors import PolicyError, WireError
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.ledger import Ledger, Row
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.policy import MemoryPolicy

WOKE = Event(12.5, "woke", "vision", 1 << 30, 0.032, "an image")
LEDGER = Ledger(
    "NVIDIA H200",
    150_000_000_000,
    None,
    (
        Row("vision", "weights", "device", 2**31, "bf16", None),
        Row("graphs", "owner", "device", None, "its pool", "cache"),
    ),
    1.25,
    "decode",
    None,
    ("a note",),
)
CASES = [
    LEDGER,
    WOKE,
    ModuleInfo("vision", "host", 5, "bfloat16", WOKE, "slow"),
    ModuleInfo("text", "device", 5, "bfloat16"),
    ConversationInfo("main", 2, 300, 4096, True, 0.5),
    Capabilities("tiny", "in this kernel", "CPU", "float32", ("text", "image"), True, True, None),
    Answer("是", "think", "stop", Usage(10, 4, 2, 3, 1), Timings(0.1, 1.0, 30.0), {"decode": 5}, "b", {"decode": 2}),
    MemoryPolicy(modules={"audio": "off"}, budget="24GiB", kv={"max_tokens": 64, "prefix_bytes": 0}),
    PageFormat(4, 2, 64, torch.bfloat16, "int8"),
    Workload(100, 10, 1, (20, 30)),
]


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(to_wire(value), allow_nan=False))


@pytest.mark.parametrize("value", CASES, ids=lambda value: type(value).__name__)
def test_what_is_sent_is_what_is_read(value: Any) -> None:
    assert from_wire(type(value), through_json(value)) == value


def test_lists_are_read_by_their_kind() -> None:
    assert from_wire(tuple[Event, ...], through_json([WOKE, WOKE])) == (WOKE, WOKE)


def test_bytes_are_ints_and_what_cannot_be_told_is_null() -> None:
    data = through_json(LEDGER)
    assert data["total"] == 150_000_000_000
    assert data["process"] is None and data["rows"][1]["nbytes"] is None
    assert through_json(MemoryPolicy(budget="24GiB"))["budget"] == 24 << 30


def test_the_ledger_and_the_modules_of_a_real_model_come_through(wb: lab.Workbench) -> None:
    for value in (*wb.engine.modules(), wb.engine.capabilities, *wb.events):
        assert from_wire(type(value), through_json(value)) == value
    ledger = wb.memory
    assert str(from_wire(Ledger, through_json(ledger))) == str(ledger)


def test_a_plan_comes_through_with_its_verdict(wb: lab.Workbench) -> None:
    plan = wb.plan(None, Workload(128, 16), search=True)
    read = from_wire(Plan, through_json(plan))
    assert read == plan and read.verdict == plan.verdict and str(read) == str(plan)
    assert from_wire(Plan, json.loads(json.dumps(plan.to_dict()))).margin == plan.margin


def test_fields_that_are_not_known_are_ignored() -> None:
    data = through_json(LEDGER) | {"new": 1}
    data["rows"][0] |= {"also": "new"}
    assert from_wire(Ledger, data) == LEDGER
    policy = through_json(MemoryPolicy(modules={"audio": "off"})) | {"dreams": 3}
    policy["kv"]["colour"] = "red"
    policy["modules"]["audio"]["mood"] = "calm"
    assert from_wire(MemoryPolicy, policy) == MemoryPolicy(modules={"audio": "off"})


def test_kinds_that_are_not_known_get_the_nearest_word() -> None:
    assert from_wire(Row, {"name": "x", "kind": "adapters", "place": "device", "nbytes": 1}).kind == "owner"
    assert from_wire(Event, {"time": 1, "kind": "trained", "subject": "x"}).kind == "note"


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (Event, {"time": 1.0, "kind": "woke"}, r"Event has no 'subject'; it has time, kind"),
        (Event, [], r"Event is an object, not \[\]"),
        (Row, {"name": "x", "kind": "kv", "place": "moon", "nbytes": 1}, r"Row.place is one of 'device'.*not 'moon'"),
        (Row, {"name": "x", "kind": "kv", "place": "host", "nbytes": "1"}, r"Row.nbytes is int, not '1'"),
        (Row, {"name": "x", "kind": "kv", "place": "host", "nbytes": True}, r"Row.nbytes is int, not True"),
        (Ledger, {"device": "d", "total": 1, "process": 1, "rows": [3], "time": 0}, r"Ledger.rows\[0\] is an object"),
        (Workload, {"context": 0}, r"context, new_tokens and conversations are at least 1"),
        (PageFormat, {"layers": 1, "kv_heads": 1, "head_dim": 2, "dtype": "load"}, r"dtype is the name of a dtype"),
    ],
)
def test_what_cannot_be_read_names_the_field(kind: Any, data: Any, message: str) -> None:
    with pytest.raises(WireError, match=message):
        from_wire(kind, data)


def test_a_policy_that_cannot_be_is_refused_as_everywhere() -> None:
    with pytest.raises(PolicyError, match=r"kv.max_tokens"):
        from_wire(MemoryPolicy, {"kv": {"max_tokens": 1}})


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(WireError, match="object has no form as JSON"):
        to_wire({"x": object()})
