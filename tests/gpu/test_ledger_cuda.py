"""The ledger, the budget and reclaiming on a GPU."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.magic import CellMeasure
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.high_water import high_water
from autoglm_lab.memory.ledger import Ledger, LedgerBook
from autoglm_lab.memory.reclaim import Reclaimer
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.memory.sampler import Sampler
from autoglm_lab.models.loading import resolve
from autoglm_lab.units import GiB, MiB
from tests.gpu.test_residency_cuda import config, logits


@pytest.fixture
def residency(accelerator: Accelerator) -> Iterator[Residency]:
    made = Residency(resolve(config(), weights="dummy", device=accelerator.device), accelerator)
    yield made
    made.close()


@pytest.fixture
def book(accelerator: Accelerator, residency: Residency) -> LedgerBook:
    made = LedgerBook(accelerator)
    made.register(residency)
    return made


def closed(ledger: Ledger) -> Ledger:
    """The ledger, once its rows are checked to add up."""
    assert sum(row.nbytes or 0 for row in ledger.on("device")) == ledger.total, str(ledger)
    return ledger


def test_the_ledger_closes_before_and_after_every_move(book: LedgerBook, residency: Residency) -> None:
    logits(residency)  # the first forward of this thread, whose workspaces have no owner here
    base = closed(book.read()).unattributed
    for move in (residency["text"].park, residency["text"].wake, residency["vision"].park, residency["head"].park):
        move().result(60)
        ledger = closed(book.read())
        # 8 MiB that the driver keeps beside 1.1 GiB of mapped pages were seen to come and go with them.
        assert abs(ledger.unattributed - base) < 12 * MiB, str(ledger)
    assert residency["text"].nbytes <= ledger.nbytes("text") < residency["text"].nbytes + 4 * MiB
    assert ledger.nbytes("vision") == 0
    assert ledger.nbytes("vision", "host") >= residency["vision"].nbytes
    assert 0 < ledger.of_kind("context") < 2 * GiB, str(ledger)


def test_a_hidden_tensor_shows_as_unattributed(book: LedgerBook, residency: Residency) -> None:
    residency.materialise()
    before = closed(book.read()).unattributed
    mine = torch.empty(500_000_000, dtype=torch.uint8, device="cuda")
    assert abs(closed(book.read()).unattributed - before - mine.numel()) < 4 * MiB
    del mine
    after = closed(book.read())
    assert abs(after.unattributed - before) < 4 * MiB
    assert after.of_kind("allocator cache") >= 500_000_000


def test_reclaiming_returns_the_allocator_s_cache(book: LedgerBook, accelerator: Accelerator) -> None:
    held = torch.empty(GiB, dtype=torch.uint8, device="cuda")
    del held
    before = book.read()
    event = Reclaimer(accelerator).reclaim("asked")
    assert event.nbytes is not None
    assert event.nbytes >= GiB
    after = closed(book.read())
    # Small blocks of other owners may stay in the cache: a segment of theirs is 2 MiB.
    assert before.of_kind("allocator cache") - after.of_kind("allocator cache") >= GiB - 4 * MiB
    assert after.free - before.free >= GiB


def test_a_budget_caps_the_allocator_with_weights_counted(accelerator: Accelerator, residency: Residency) -> None:
    residency.materialise()
    accelerator.give_back()
    process = accelerator.reading().process
    assert process is not None
    accelerator.set_budget(process + 512 * MiB)
    fits = torch.empty(256 * MiB, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(512 * MiB, dtype=torch.uint8, device="cuda")
    residency["text"].park().result(60)  # what the weights leave, the allocator may have
    larger = torch.empty(512 * MiB, dtype=torch.uint8, device="cuda")
    assert fits.numel() + larger.numel() == 768 * MiB


def test_weights_beyond_the_budget_are_refused(accelerator: Accelerator, residency: Residency) -> None:
    residency["vision"].wake()
    process = accelerator.reading().process
    assert process is not None
    accelerator.set_budget(process + 64 * MiB)
    with pytest.raises(OutOfMemoryError, match=r"out of memory in load: needed .* had .*raise budget="):
        residency["text"].wake()
    assert residency["text"].place == "disk"
    accelerator.set_budget(None)
    residency["text"].wake()


def test_sampling_goes_on_while_the_device_works(book: LedgerBook, residency: Residency) -> None:
    residency.materialise()
    with Sampler(book.read, hz=50) as sampler:
        for _ in range(20):
            logits(residency)
            residency["vision"].park()
            residency["vision"].wake()
    samples = sampler.samples()
    assert len(samples) >= 3
    assert all(sum(row.nbytes or 0 for row in ledger.on("device")) == ledger.total for ledger in samples)
    assert [event for event in sampler.events() if event.subject == "sampler"] == []


def fresh(code: str) -> Any:
    """What a process of its own prints as JSON: one where CUDA has not started yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


GROWTH = """
import json, torch
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.ledger import LedgerBook

def work():
    with torch.no_grad():
        wide = torch.ones(2048, 2048, device="cuda", dtype=torch.bfloat16)
        heads = torch.ones(1, 8, 512, 64, device="cuda", dtype=torch.bfloat16)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        torch.softmax((wide @ wide).float(), dim=-1).sum().item()

accelerator = open_accelerator("cuda")
book = LedgerBook(accelerator)
accelerator.warm_up()
warm = book.read()
with accelerator.growth("first step"):
    work()
with accelerator.growth("stream"), torch.cuda.stream(torch.cuda.Stream()):
    accelerator.warm_up()
    work()
after = book.read()
print(json.dumps({
    "workspaces": [ledger.nbytes("workspaces") for ledger in (warm, after)],
    "growth": after.nbytes("driver growth"),
    "parts": accelerator.grown.parts,
    "unattributed": [warm.unattributed, after.unattributed],
    "total": after.total,
    "sum": sum(row.nbytes for row in after.on("device")),
}))
"""


def test_what_cuda_takes_after_its_start_is_named_to_the_byte() -> None:
    found = fresh(GROWTH)
    assert found["sum"] == found["total"]
    assert found["workspaces"][0] > 0
    assert found["workspaces"][1] >= found["workspaces"][0]
    assert found["growth"] > 0, found
    assert "first step" in found["parts"], found
    assert all(abs(nbytes) <= 2 * MiB for nbytes in found["unattributed"]), found


EXPANDABLE = """
import json, torch
import autoglm_lab as lab

policy = lab.MemoryPolicy(reclaim={"expandable_segments": True})
with lab.load("autoglm-tiny", device="cuda", policy=policy) as wb:
    held = torch.ones(64 << 20, device="cuda", dtype=torch.uint8)
    segments = torch.cuda.memory.memory_snapshot()
    ledger = wb.memory
    print(json.dumps({
        "expandable": any(segment["is_expandable"] for segment in segments),
        "notes": [str(event) for event in wb.events if "expandable_segments" in str(event)],
        "sum": sum(row.nbytes for row in ledger.on("device")),
        "total": ledger.total,
    }))
"""


def test_expandable_segments_are_set_before_the_allocator_has_memory() -> None:
    found = fresh(EXPANDABLE)
    assert found["expandable"]
    assert found["notes"] == []
    assert found["sum"] == found["total"]


def test_once_the_allocator_has_memory_a_note_says_that_it_is_too_late(wb: lab.Workbench) -> None:
    torch.ones(1, device="cuda")
    wb.policy = wb.policy.replace(reclaim={"expandable_segments": True})
    assert "comes too late: torch has memory" in next(event.why for event in reversed(wb.events) if "late" in event.why)


@pytest.fixture(scope="module")
def wb() -> Iterator[lab.Workbench]:
    with lab.load("autoglm-tiny", device="cuda", dtype="float32") as workbench:
        yield workbench


def test_an_answer_tells_its_phases_activations_apart(wb: lab.Workbench) -> None:
    answer = wb.chat("你是谁? " * 50, conversation="peaks").result(60)
    assert answer.work_bytes["prefill"] > 0
    assert all(answer.work_bytes[phase] < nbytes for phase, nbytes in answer.peak_bytes.items())


def test_the_engine_s_workspaces_have_a_row(wb: lab.Workbench) -> None:
    wb.chat("你是谁?", conversation="row").result(60)
    assert closed(wb.memory).nbytes("workspaces") > 0


def test_a_cell_reports_what_it_left_on_the_device(wb: lab.Workbench) -> None:
    measure = CellMeasure()
    kept = torch.empty(500 * MiB, dtype=torch.uint8, device="cuda")
    torch.empty(200 * MiB, dtype=torch.uint8, device="cuda")
    text = measure.report()
    assert text.startswith("peak over the start of this cell: 700.0 MiB of tensors")
    found = re.search(r"unattributed: \+([\d.]+) MiB", text)
    assert found, text
    assert float(found.group(1)) == pytest.approx(500, abs=4)
    assert kept.numel() == 500 * MiB
    assert not wb.closed


def test_two_watches_do_not_disturb_one_another(device: torch.device) -> None:
    marks = high_water(device)
    outer = marks.open()
    torch.empty(300 * MiB, dtype=torch.uint8, device=device)
    inner = marks.open()
    torch.empty(100 * MiB, dtype=torch.uint8, device=device)
    assert marks.close(inner, 0).work == 100 * MiB
    assert marks.close(outer, 0).work == 300 * MiB


def test_a_snapshot_holds_every_byte_of_the_process(wb: lab.Workbench, tmp_path: Path) -> None:
    taken = pickle.loads(wb.snapshot(tmp_path / "memory.pickle").read_bytes())
    ledger = closed(wb.memory)
    ours = [one for one in taken["segments"] if "autoglm_lab" in str(one["blocks"][:1])]
    named = {one["blocks"][0]["frames"][0]["name"].split(":")[0] for one in ours}
    assert {"text", "vision", "context"} <= named
    total = sum(one["total_size"] for one in taken["segments"])
    counters = wb.engine.state.accelerator.counters()
    # The driver's own count moves in steps of 2 MiB, and may have between the two readings.
    assert abs(total - counters.reserved - counters.slabs - ledger.of_kind("context")) <= 4 * MiB
    assert torch.cuda.memory.memory_snapshot()


def test_under_a_budget_the_driver_never_sees_more(accelerator: Accelerator, residency: Residency) -> None:
    residency.materialise()
    accelerator.give_back()
    process = accelerator.reading().process
    assert process is not None
    budget = process + 300 * MiB
    accelerator.set_budget(budget)
    held: list[torch.Tensor] = []

    def fill() -> None:
        while len(held) < 4096:
            held.append(torch.empty(8 * MiB, dtype=torch.uint8, device="cuda"))

    for move in (None, residency["vision"].park, residency["vision"].wake):
        held.clear()
        accelerator.give_back()
        if move is not None:
            move().result()
        with pytest.raises(torch.OutOfMemoryError):
            fill()
        now = accelerator.reading().process
        assert now is not None
        assert budget - 64 * MiB < now <= budget
        assert 0 <= accelerator.headroom() < 64 * MiB
