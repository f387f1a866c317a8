from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from autoglm_lab.memory.accelerator import Accelerator, Counters, Reading
from autoglm_lab.memory.ledger import Ledger, LedgerBook, Row
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.units import GiB, MiB


class Cache:
    """An owner as the engine has them."""

    def __init__(self, nbytes: int, name: str = "KV main") -> None:
        self.nbytes, self.name = nbytes, name

    def holdings(self) -> Iterable[Row]:
        return [Row(self.name, "kv", "device", self.nbytes)]


class Card:
    """A GPU's figures without a GPU."""

    kind = "cuda"
    name = "GPU of 24 GiB"
    budget = None
    notes: tuple[str, ...] = ()
    context = 600 * MiB

    def __init__(self, *readings: Reading) -> None:
        self._readings = list(readings)
        self.asked = 0

    def reading(self) -> Reading:
        self.asked += 1
        return self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]

    def counters(self) -> Counters:
        now = self._readings[0]
        return Counters(now.slabs, now.allocated or 0, now.reserved or 0)

    def holdings(self) -> Iterable[Row]:
        return [Row("context", "context", "device", self.context)]


def reading(**figures: int) -> Reading:
    """8 GiB of slabs, 3 GiB in the allocator of which 1 GiB is cached, 0.25 GiB of driver memory."""
    process = 8 * GiB + 3 * GiB + 600 * MiB
    base: dict[str, int] = {
        "total": 24 * GiB,
        "free": 24 * GiB - process - 2 * GiB - GiB // 4,
        "used": process + 2 * GiB,
        "process": process,
        "driver_reserved": GiB // 4,
        "allocated": 2 * GiB,
        "reserved": 3 * GiB,
        "slabs": 8 * GiB,
    }
    return Reading(time=1.0, **{**base, **figures})


def total_of(ledger: Ledger) -> int:
    return sum(row.nbytes or 0 for row in ledger.on("device"))


def test_the_rows_on_a_cpu_add_up_to_the_machine(loaded: Residency, accelerator: Accelerator) -> None:
    book = LedgerBook(accelerator)
    book.register(loaded)
    book.register(Cache(1000))
    for _ in range(20):
        ledger = book.read("decode", budget=GiB)
        assert total_of(ledger) == ledger.total == accelerator.total
    assert ledger.process == sum(
        row.nbytes or 0 for row in ledger.on("device") if row.kind not in {"free", "other processes"}
    )
    assert (ledger.phase, ledger.budget) == ("decode", GiB)
    assert ledger.nbytes("KV main") == 1000


def test_a_tensor_in_a_variable_shows_as_unattributed(loaded: Residency, accelerator: Accelerator) -> None:
    book = LedgerBook(accelerator)
    book.register(loaded)
    before = book.read().unattributed
    mine = torch.ones(500_000_000, dtype=torch.uint8)
    grown = book.read().unattributed - before
    assert abs(grown - mine.numel()) < 10_000_000
    del mine
    assert abs(book.read().unattributed - before) < 10_000_000


def test_waking_and_parking_move_bytes_between_rows_and_nothing_into_unattributed(
    loaded: Residency, accelerator: Accelerator
) -> None:
    book = LedgerBook(accelerator)
    book.register(loaded)
    before = book.read()
    loaded["text"].park()
    parked = book.read()
    assert parked.nbytes("text") == 0
    assert parked.nbytes("text", "disk") == loaded["text"].nbytes
    assert abs(parked.unattributed - before.unattributed) < 2 * MiB


def test_the_rows_on_a_gpu_add_up_and_close() -> None:
    book = LedgerBook(Card(reading()))  # type: ignore[arg-type]
    weights, cache = Cache(8 * GiB, "text"), Cache(GiB + GiB // 2)
    book.register(weights)
    book.register(cache)
    ledger = book.read()
    assert total_of(ledger) == ledger.total
    assert ledger.of_kind("allocator cache") == GiB
    assert ledger.of_kind("driver reserved") == GiB // 4
    assert ledger.of_kind("other processes") == 2 * GiB
    assert ledger.unattributed == GiB // 2  # allocated, without an owner
    assert ledger.free == reading().free


class Graphs:
    """Captured graphs: a private pool, held by the allocator and in no tensor, and a static output."""

    def holdings(self) -> Iterable[Row]:
        yield Row("decode graphs", "owner", "device", GiB // 4, within="cache")
        yield Row("decode graphs", "owner", "device", GiB // 8, within="allocator")


def test_what_an_owner_has_in_the_allocator_s_cache_is_not_counted_as_cache_again() -> None:
    book = LedgerBook(Card(reading()))  # type: ignore[arg-type]
    book.register(Cache(8 * GiB, "text"))
    book.register(Graphs())
    ledger = book.read()
    assert ledger.nbytes("decode graphs") == GiB // 4 + GiB // 8
    assert ledger.of_kind("allocator cache") == GiB - GiB // 4
    assert ledger.unattributed == 2 * GiB - GiB // 8  # allocated, less the graphs' output
    assert total_of(ledger) == ledger.total


def test_unattributed_may_fall_below_zero_and_says_why() -> None:
    book = LedgerBook(Card(reading()))  # type: ignore[arg-type]
    book.register(Cache(12 * GiB))
    ledger = book.read()
    assert ledger.unattributed < 0
    assert total_of(ledger) == ledger.total
    assert any("below zero" in note for note in ledger.notes)


def test_a_reading_that_straddles_a_change_is_taken_again() -> None:
    changed = reading(slabs=6 * GiB)
    card = Card(reading(), changed, changed)
    LedgerBook(card).read()  # type: ignore[arg-type]
    assert card.asked == 2


def test_owners_come_and_go(accelerator: Accelerator) -> None:
    book, cache = LedgerBook(accelerator), Cache(7)
    book.register(cache)
    book.register(cache)
    assert book.read().nbytes("KV main") == 7
    book.unregister(cache)
    assert book.read().nbytes("KV main") == 0


def test_reading_while_modules_move_always_adds_up(loaded: Residency, accelerator: Accelerator) -> None:
    book = LedgerBook(accelerator)
    book.register(loaded)
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            loaded["text"].park()
            loaded["text"].wake()

    thread = threading.Thread(target=move)
    thread.start()
    try:
        assert all(total_of(ledger) == ledger.total for ledger in (book.read() for _ in range(200)))
    finally:
        stop.set()
        thread.join()


def fixed() -> Ledger:
    rows = (
        Row("text", "weights", "device", 6 * GiB, "weights in bfloat16"),
        Row("vision", "weights", "host", GiB, "host copy, pinned"),
        Row("a <b>", "kv", "device", 300 * MiB, "keys & values"),
        Row("free", "free", "device", 18 * GiB - 300 * MiB),
    )
    return Ledger("GPU", 24 * GiB, 6 * GiB, rows, 1.0, "prefill", 12 * GiB, ("a note",))


def test_a_ledger_as_text_is_a_table() -> None:
    assert str(fixed()).splitlines() == [
        "GPU: 24.00 GiB, this process 6.00 GiB of a budget of 12.00 GiB, prefill",
        "  text             6.00 GiB  25.0 %  weights in bfloat16",
        "  vision (host)    1.00 GiB          host copy, pinned",
        "  a <b>           300.0 MiB   1.2 %  keys & values",
        "  free            17.71 GiB  73.8 %",
        "  total           24.00 GiB   100 %",
        "  note: a note",
    ]


def test_a_ledger_as_html_is_escaped_and_needs_no_script() -> None:
    html = fixed()._repr_html_()
    assert "a &lt;b&gt;" in html
    assert "keys &amp; values" in html
    assert "<script" not in html
    assert "<svg" in html
    assert html == fixed()._repr_html_()


def test_the_picture_is_drawn_to_scale() -> None:
    picture = fixed().picture()
    assert 'x="0.0" y="1" width="180.0"' in picture  # 6 of 24 GiB of 720 units
    assert "<title>budget 12.00 GiB</title>" in picture
    assert 'x1="360.0"' in picture
