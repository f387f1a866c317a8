from __future__ import annotations

import threading

import pytest
import torch

from autoglm_lab.memory import accelerator as module
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.ledger import LedgerBook
from autoglm_lab.units import GiB, MiB
from tests.unit.memory.card import Card


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    monkeypatch.setattr(module, "CudaMachine", Card)
    return Accelerator(torch.device("cuda", 0))


@pytest.fixture
def card(gpu: Accelerator) -> Card:
    machine: Card = gpu._machine  # type: ignore[assignment]
    return machine


def test_what_the_driver_takes_meanwhile_is_a_row_that_names_its_parts(gpu: Accelerator, card: Card) -> None:
    book = LedgerBook(gpu)
    with gpu.growth("first prefill"):
        card.driver += 100 * MiB
        card.reserved += GiB  # the allocator's own bytes are no part of it
    with gpu.growth("decode graphs"):
        card.driver += 50 * MiB
    ledger = book.read()
    assert ledger.nbytes("driver growth") == 150 * MiB
    assert ledger.of_kind("context") == 750 * MiB
    assert ledger.unattributed == 0
    (row,) = (row for row in ledger.rows if row.name == "driver growth")
    assert row.counts.endswith("read before and after: first prefill 100.0 MiB, decode graphs 50.0 MiB")


def test_growth_outside_of_every_bracket_stays_unattributed(gpu: Accelerator, card: Card) -> None:
    with gpu.growth("first prefill"):
        card.driver += 100 * MiB
    card.driver += 70 * MiB
    ledger = LedgerBook(gpu).read()
    assert (ledger.nbytes("driver growth"), ledger.unattributed) == (100 * MiB, 70 * MiB)


def test_brackets_in_one_another_each_count_their_own(gpu: Accelerator, card: Card) -> None:
    with gpu.growth("first prefill"):
        card.driver += 10 * MiB
        with gpu.growth("first encode"):
            card.driver += 30 * MiB
        card.driver += 5 * MiB
    assert gpu.grown.parts == {"first encode": 30 * MiB, "first prefill": 15 * MiB}


def test_what_is_given_back_in_a_bracket_of_the_same_name_leaves_the_row(gpu: Accelerator, card: Card) -> None:
    with gpu.growth("decode graphs"):
        card.driver += 40 * MiB
    with gpu.growth("decode graphs"):
        card.driver -= 40 * MiB
    assert gpu.grown.parts == {}


def test_slabs_that_come_in_a_bracket_are_no_growth(gpu: Accelerator, card: Card) -> None:
    with gpu.growth("first decode"):
        with gpu.moving():
            card.outside += 2 * GiB
            gpu.hold(2 * GiB)
        card.driver += 3 * MiB
    assert gpu.grown.parts == {"first decode": 3 * MiB}


def test_a_slab_on_its_way_while_the_bracket_ends_is_waited_for(
    gpu: Accelerator, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = gpu.moving()
    ask, left = card.process_bytes, 2

    def process() -> int | None:
        nonlocal left
        left -= 1
        if left == 0:  # the other thread has got further
            gpu.hold(GiB)
            move.__exit__(None, None, None)
        return ask()

    with gpu.growth("first decode"):
        card.outside += GiB
        move.__enter__()
        monkeypatch.setattr(card, "process_bytes", process)
    assert gpu.grown.parts == {}


@pytest.mark.parametrize("at", ["begin", "end"])
def test_slabs_that_move_for_long_are_never_the_drivers(gpu: Accelerator, card: Card, at: str) -> None:
    move = gpu.moving()
    if at == "begin":
        move.__enter__()
        card.outside += 11 * GiB  # mapped, and not counted yet
    with gpu.growth("first decode"):
        if at == "begin":
            gpu.hold(11 * GiB)
            move.__exit__(None, None, None)
        else:
            move.__enter__()
            card.outside += 11 * GiB
    assert gpu.grown.parts == {}
    gpu.set_budget(16 * GiB)
    if at == "end":
        gpu.hold(11 * GiB)
        move.__exit__(None, None, None)
    assert gpu.headroom() == 5 * GiB - 600 * MiB
    assert card.cap == 5 * GiB - 600 * MiB


def test_only_the_first_uses_are_measured_when_asked_so(gpu: Accelerator, card: Card) -> None:
    for _ in range(5):
        with gpu.growth("decode", times=2):
            card.driver += MiB
    assert gpu.grown.parts == {"decode": 2 * MiB}
    asked = card.asked
    with gpu.growth("decode", times=2):
        pass
    assert card.asked == asked


def test_brackets_of_several_threads_count_nothing_twice(gpu: Accelerator, card: Card) -> None:
    entered, grown = threading.Event(), threading.Event()

    def other() -> None:
        with gpu.growth("capture"):
            entered.set()
            grown.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    with gpu.growth("prefill"):
        card.driver += 64 * MiB
    grown.set()
    thread.join()
    assert gpu.grown.parts == {"prefill": 64 * MiB}


def test_a_failed_step_still_counts_what_the_driver_took(gpu: Accelerator, card: Card) -> None:
    def step() -> None:
        with gpu.growth("first prefill"):
            card.driver += MiB
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        step()
    assert gpu.grown.parts == {"first prefill": MiB}


def test_reading_the_context_anew_begins_anew(gpu: Accelerator, card: Card) -> None:
    with gpu.growth("first prefill"):
        card.driver += 100 * MiB
    gpu.read_context()
    assert gpu.context == 700 * MiB
    assert gpu.grown.parts == {}


def test_nothing_is_measured_where_the_driver_hides_it_or_on_a_cpu(
    gpu: Accelerator, card: Card, accelerator: Accelerator
) -> None:
    card.hidden = True
    with gpu.growth("first prefill"), accelerator.growth("first prefill"):
        card.driver += 100 * MiB
    assert gpu.grown.parts == accelerator.grown.parts == {}
    ledger = LedgerBook(gpu).read()
    assert sum(row.nbytes or 0 for row in ledger.on("device")) == ledger.total
    assert ledger.unattributed == 0


def test_warming_up_names_the_workspaces_and_the_libraries(gpu: Accelerator) -> None:
    gpu.warm_up()
    ledger = LedgerBook(gpu).read()
    assert ledger.nbytes("workspaces") == 32 * MiB
    assert ledger.nbytes("driver growth") == 8 * MiB
    assert ledger.unattributed == 0


def test_the_allocator_may_have_what_context_growth_and_slabs_leave_of_the_budget(gpu: Accelerator, card: Card) -> None:
    gpu.set_budget(8 * GiB)
    assert card.cap == 8 * GiB - 600 * MiB
    card.outside += 5 * GiB
    gpu.hold(5 * GiB)
    assert card.cap == 3 * GiB - 600 * MiB
    assert gpu.headroom() == 3 * GiB - 600 * MiB
    with gpu.growth("decode graphs"):
        card.driver += 100 * MiB
    assert card.cap == gpu.headroom() == 3 * GiB - 700 * MiB
    card.outside -= 5 * GiB
    gpu.hold(-5 * GiB)
    assert card.cap == 8 * GiB - 700 * MiB
    gpu.set_budget(None)
    assert card.cap is None


def test_a_budget_also_counts_what_the_driver_took_without_a_name(gpu: Accelerator, card: Card) -> None:
    card.driver += 200 * MiB
    gpu.set_budget(8 * GiB)
    assert card.cap == 8 * GiB - 800 * MiB


def test_what_the_driver_took_while_slabs_moved_is_off_the_allocators_cap_once_they_have(
    gpu: Accelerator, card: Card
) -> None:
    gpu.set_budget(8 * GiB)
    with gpu.growth("kernels of prefill"):
        card.driver += 80 * MiB
        parking = gpu.moving()
        parking.__enter__()
    assert gpu.grown.parts == {}
    parking.__exit__(None, None, None)
    assert card.cap == gpu.headroom() == 8 * GiB - 680 * MiB


def test_what_the_driver_took_stays_off_the_cap_while_it_cannot_be_told(gpu: Accelerator, card: Card) -> None:
    card.driver += 80 * MiB
    gpu.set_budget(8 * GiB)
    with gpu.moving(), gpu.growth("first decode"):
        pass
    with gpu.moving():
        gpu.set_budget(8 * GiB)
        assert card.cap == 8 * GiB - 680 * MiB


def test_a_bracket_leaves_room_for_what_cannot_be_counted_yet(gpu: Accelerator, card: Card) -> None:
    gpu.set_budget(12 * GiB)
    caps = []
    for _ in range(2):
        with gpu.growth("kernels of prefill"):
            caps.append(card.cap)
    assert caps == [12 * GiB - 616 * MiB, 12 * GiB - 604 * MiB]
    assert card.cap == 12 * GiB - 600 * MiB


def test_a_bracket_in_another_takes_what_it_counted_off_the_cap_at_its_end(gpu: Accelerator, card: Card) -> None:
    gpu.set_budget(12 * GiB)
    with gpu.growth("kernels of prefill"), gpu.growth("kernels of encoders"):
        pass
    with gpu.growth("kernels of prefill"):
        with gpu.growth("kernels of encoders"):
            card.driver += 10 * MiB
        assert card.cap == 12 * GiB - 614 * MiB


def test_a_budget_set_by_another_thread_while_a_bracket_is_open_stays(gpu: Accelerator, card: Card) -> None:
    gpu.set_budget(12 * GiB)
    with gpu.growth("first decode"):
        gpu.set_budget(8 * GiB)
    assert (gpu.budget, card.cap) == (8 * GiB, 8 * GiB - 600 * MiB)
