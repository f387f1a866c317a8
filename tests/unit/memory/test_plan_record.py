"""What plans said beside what was measured, kept in a file that may be missing, broken or read-only."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import pytest

from autoglm_lab.memory.planning import plan_record
from autoglm_lab.memory.planning.device_constants import PlanDevice, corrected
from autoglm_lab.memory.planning.plan_record import MOST_LINES, PlanEntry, PlanRecord
from autoglm_lab.units import MiB

ENTRY = PlanEntry(
    time=1.0,
    model="autoglm-tiny",
    dtype="float32",
    device="NVIDIA H200",
    predicted={"prefill": 110, "decode": 90},
    measured={"prefill": 100, "decode": 95},
    context=500 * MiB,
    grown=120 * MiB,
    workspaces=67 * MiB,
)
TAKEN = (570 * MiB, 108 * MiB, 120 * MiB, 200 * MiB, 260 * MiB)
H200 = PlanDevice("NVIDIA H200", "cuda", 100, 100, *TAKEN, 17 * MiB, estimated=True)


@pytest.fixture
def record(tmp_path) -> PlanRecord:
    return PlanRecord(tmp_path / "deep" / "plans.jsonl")


def test_an_entry_comes_back_as_it_was(record):
    record.add(ENTRY)
    assert record.entries("NVIDIA H200") == (ENTRY,)
    assert record.entries("another") == record.entries("NVIDIA H200", "another") == ()


def test_the_error_is_that_of_the_largest_phase():
    assert ENTRY.error == pytest.approx(0.1)
    assert replace(ENTRY, predicted={"decode": 76}).error == pytest.approx(-0.2)
    assert replace(ENTRY, measured={"encode": 5}).error is None


def test_errors_are_the_last_and_the_middle_of_the_latest(record):
    assert record.errors("NVIDIA H200", "autoglm-tiny", "float32") is None
    for predicted in (200, 98, 101):
        record.add(replace(ENTRY, predicted={"prefill": predicted}))
    record.add(replace(ENTRY, model="another", predicted={"prefill": 500}))
    errors = record.errors("NVIDIA H200", "autoglm-tiny", "float32")
    assert errors is not None
    assert (errors.last, errors.median, errors.count) == (pytest.approx(0.01), pytest.approx(0.02), 3)


def test_the_file_keeps_only_the_latest(tmp_path):
    file = tmp_path / "plans.jsonl"
    old = "".join(json.dumps(asdict(replace(ENTRY, time=float(at)))) + "\n" for at in range(MOST_LINES))
    file.write_text(old)
    PlanRecord(file).add(replace(ENTRY, time=1e9))
    entries = PlanRecord(file).entries("NVIDIA H200")
    assert len(entries) == MOST_LINES == len(file.read_text().splitlines())
    assert (entries[0].time, entries[-1].time) == (1.0, 1e9)
    assert [one.name for one in tmp_path.iterdir()] == ["plans.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        "null",
        "{}",
        '{"time": 1}',
        json.dumps(asdict(ENTRY) | {"predicted": [1]}),
        json.dumps(asdict(ENTRY) | {"measured": {"prefill": "100"}}),
        json.dumps(asdict(ENTRY) | {"grown": -1}),
        json.dumps(asdict(ENTRY) | {"unknown": 1}),
    ],
)
def test_broken_lines_are_left_out(tmp_path, line):
    file = tmp_path / "plans.jsonl"
    file.write_text(f"{line}\n{json.dumps(asdict(ENTRY))}\n", encoding="utf-8")
    assert PlanRecord(file).entries("NVIDIA H200") == (ENTRY,)


def test_a_file_that_cannot_be_written_or_read_is_as_good_as_none(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "file" / "plans.jsonl", tmp_path / "folder"):
        record = PlanRecord(file)
        record.add(ENTRY)
        assert record.entries("NVIDIA H200") == ()
        assert record.learnt("NVIDIA H200") is None


def test_constants_are_those_of_this_machine_once_they_were_seen(record):
    assert corrected(H200, record) == H200
    for context, grown in ((500, 90), (520, 130), (510, 60), (510, 11_000)):  # the last is a misreading
        record.add(replace(ENTRY, context=context * MiB, grown=grown * MiB))
    device = corrected(H200, record)
    assert (device.context, device.working, device.workspaces) == (510 * MiB, 130 * MiB, 67 * MiB)
    assert not device.estimated
    host = replace(H200, name="NVIDIA H200", kind="cpu", working=0)
    assert corrected(host, record).working == 0


def test_the_folder_is_the_users_cache(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert FOLDER() == tmp_path / "autoglm-lab"
        patch.setenv("XDG_CACHE_HOME", "relative")
        patch.setenv("HOME", str(tmp_path))
        patch.setattr(sys, "platform", "linux")
        assert FOLDER() == tmp_path / ".cache" / "autoglm-lab"
        patch.setattr(sys, "platform", "darwin")
        assert FOLDER() == tmp_path / "Library" / "Caches" / "autoglm-lab"


FOLDER = plan_record.cache_folder  # before the tests' own folder takes its place
