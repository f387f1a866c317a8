from __future__ import annotations

import math
import struct

from autoglm_lab.memory.ledger import Ledger, Row
from autoglm_lab.widgets.series import FIXED_COLUMNS, MOST_SERIES, SeriesBook, thin


def ledger(time: float, *rows: Row, process: int | None = 100, budget: int | None = None) -> Ledger:
    return Ledger("CPU", 1000, process, rows, time, budget=budget)


def decode(message: bytes) -> list[tuple[float, list[float]]]:
    """As live_plot.js reads it."""
    count, columns = struct.unpack_from("<II", message)
    size = 8 + 4 * columns
    return [
        (
            struct.unpack_from("<d", message, 8 + i * size)[0],
            list(struct.unpack_from(f"<{columns}f", message, 16 + i * size)),
        )
        for i in range(count)
    ]


def test_a_sample_survives_the_message_and_costs_tens_of_bytes():
    book = SeriesBook()
    message = book.encode(
        [ledger(5.25, Row("text", "weights", "device", 70), Row("free", "free", "device", 900), budget=400)]
    )
    assert decode(message) == [(5.25, [100.0, 400.0, 70.0])]
    assert len(message) < 64
    assert [series["name"] for series in book.series] == ["text"]


def test_a_new_owner_gets_a_new_column_and_old_columns_keep_theirs():
    book = SeriesBook()
    text, audio = Row("text", "weights", "device", 70), Row("audio", "weights", "device", 9)
    first = book.encode([ledger(1, text)])
    both = book.encode([ledger(2, text), ledger(3, audio, text), ledger(4, audio)])
    assert decode(first)[0][1][FIXED_COLUMNS:] == [70]
    assert [values[FIXED_COLUMNS:] for _, values in decode(both)] == [[70, 0], [70, 9], [0, 9]]


def test_what_the_machine_cannot_tell_is_not_a_zero():
    values = decode(SeriesBook().encode([ledger(1, Row("x", "context", "device", None), process=None)]))[0][1]
    assert all(math.isnan(value) for value in values)


def test_only_the_device_is_drawn():
    book = SeriesBook()
    book.encode([ledger(1, Row("audio", "weights", "disk", 5))])
    assert book.series == []


def test_columns_are_bounded_and_no_byte_is_lost_at_the_bound():
    book = SeriesBook()
    rows = [Row(f"KV chat {n}", "kv", "device", 1) for n in range(MOST_SERIES + 25)]
    values = decode(book.encode([ledger(1, *rows)]))[0][1]
    assert len(book.series) == MOST_SERIES
    assert sum(values[FIXED_COLUMNS:]) == len(rows)


def test_thinning_a_history_keeps_its_highest_peak_and_its_order():
    samples = [ledger(n, process=10_000 if n == 333 else n) for n in range(1000)]
    kept = thin(samples, 100)
    assert len(kept) <= 100
    assert max(sample.process or 0 for sample in kept) == 10_000
    assert [sample.time for sample in kept] == sorted(sample.time for sample in kept)
    assert thin(samples[:5], 100) == samples[:5]
