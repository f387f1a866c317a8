from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger, Row
from autoglm_lab.memory.sampler import Sampler


def ledger(process: int = 0, moment: float = 0.0) -> Ledger:
    return Ledger("device", 100, process, (), moment)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 s"
        time.sleep(0.005)


def test_samples_come_by_themselves_until_stopped() -> None:
    def threads() -> int:
        return sum(thread.name == "autoglm-lab sampler" for thread in threading.enumerate())

    sampler, before = Sampler(ledger, hz=200), threads()
    sampler.start()
    sampler.start()
    until(lambda: len(sampler.samples()) >= 5)
    assert threads() == before + 1
    sampler.stop()
    sampler.stop()
    assert not sampler.running
    count = len(sampler.samples())
    time.sleep(0.05)
    assert len(sampler.samples()) == count
    sampler.start()
    until(lambda: len(sampler.samples()) > count)
    sampler.stop()


def test_rings_are_bounded() -> None:
    sampler = Sampler(ledger, hz=10, seconds=3)
    for _ in range(100):
        sampler.sample()
    assert len(sampler.samples()) == 30
    for count in range(5000):
        sampler.record(Event(count, "note", "x"))
    assert len(sampler.events()) == 2000
    assert sampler.events()[-1].time == 4999


def test_rows_that_stay_the_same_are_kept_once() -> None:
    moments = iter(range(3))

    def read() -> Ledger:
        moment = next(moments)
        rows = (Row("text", "weights", "device", 50, "its " + "weights"), Row("KV", "kv", "device", moment))
        return Ledger("device", 100, 50, rows, float(moment))

    sampler = Sampler(read)
    for _ in range(3):
        sampler.sample()
    first, _, last = sampler.samples()
    assert last.rows[0] is first.rows[0]
    assert [ledger.rows[1].nbytes for ledger in sampler.samples()] == [0, 1, 2]
    assert [ledger.time for ledger in sampler.samples()] == [0.0, 1.0, 2.0]


def test_a_failing_read_is_noted_once_and_survived() -> None:
    calls = 0

    def read() -> Ledger:
        nonlocal calls
        calls += 1
        if calls < 10:
            raise RuntimeError("the driver is gone")
        return ledger(calls)

    sampler = Sampler(read, hz=500)
    with sampler:
        until(lambda: sampler.latest is not None)
    (event,) = sampler.events()
    assert (event.kind, event.subject, event.why) == ("note", "sampler", "RuntimeError: the driver is gone")


def test_a_failing_listener_does_not_stop_the_others() -> None:
    sampler = Sampler(ledger)
    seen: list[Ledger] = []

    def fail(_: Ledger) -> None:
        raise ValueError("no")

    sampler.on_sample(fail)
    sampler.on_sample(seen.append)
    sampler.sample()
    sampler.off_sample(fail)
    sampler.sample()
    sampler.off_sample(seen.append)
    sampler.sample()
    assert len(seen) == 2
    assert [event.why for event in sampler.events()] == ["ValueError: no"]


def test_the_peak_is_of_the_time_asked_for() -> None:
    readings = iter([ledger(50, 1.0), ledger(90, 2.0), ledger(70, 3.0)])
    sampler = Sampler(lambda: next(readings))
    assert sampler.latest is None
    assert sampler.peak(0) == 0
    for _ in range(3):
        sampler.sample()
    assert sampler.peak(0) == 90
    assert sampler.peak(2.5) == 70
    assert sampler.peak(9) == 0


@pytest.mark.parametrize(("hz", "seconds"), [(0, 1), (1, 0), (-1, 1)])
def test_impossible_rates_are_refused(hz: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        Sampler(ledger, hz=hz, seconds=seconds)
