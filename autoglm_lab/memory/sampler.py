"""Ledgers over time: a background thread, and rings of samples and events with bounded memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Self

from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger

_EVENTS = 2000


class Sampler:
    """Reads a ledger some times a second and keeps the last minutes of them.

    Args:
        read: gives a ledger; called from the sampler's own thread.
        hz: samples a second.
        seconds: how far back samples are kept.
    """

    def __init__(self, read: Callable[[], Ledger], hz: float = 10.0, seconds: float = 600.0) -> None:
        if not (hz > 0 and seconds > 0):
            raise ValueError(f"hz and seconds must be more than 0, got {hz} and {seconds}")
        self._read = read
        self.hz = hz
        self._samples: deque[Ledger] = deque(maxlen=max(1, round(hz * seconds)))
        self._events: deque[Event] = deque(maxlen=_EVENTS)
        self._listeners: tuple[Callable[[Ledger], None], ...] = ()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failing = ""

    def start(self) -> None:
        """Begin sampling; again is no harm."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(self._stop,), name="autoglm-lab sampler", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End sampling and wait for the thread; what was sampled stays. Again is no harm."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._stop.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)

    @property
    def running(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive()

    @property
    def latest(self) -> Ledger | None:
        """The last sample; None before the first."""
        with self._lock:
            return self._samples[-1] if self._samples else None

    def samples(self) -> tuple[Ledger, ...]:
        """The samples that are kept, oldest first."""
        with self._lock:
            return tuple(self._samples)

    def events(self) -> tuple[Event, ...]:
        """The last events, oldest first."""
        with self._lock:
            return tuple(self._events)

    def record(self, event: Event) -> None:
        """Add an event; from any thread."""
        with self._lock:
            self._events.append(event)

    def peak(self, since: float) -> int:
        """The most bytes the process held in samples from ``since`` (seconds since the epoch) on; 0 without any."""
        with self._lock:
            return max((ledger.process or 0 for ledger in self._samples if ledger.time >= since), default=0)

    def on_sample(self, listener: Callable[[Ledger], None]) -> None:
        """Call ``listener`` with every new sample, on the sampler's thread."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

    def off_sample(self, listener: Callable[[Ledger], None]) -> None:
        with self._lock:
            self._listeners = tuple(known for known in self._listeners if known != listener)

    def sample(self) -> Ledger:
        """Take one sample now, beside those of the thread."""
        ledger = self._read()
        with self._lock:
            if self._samples:
                ledger = _sharing(ledger, self._samples[-1])
            self._samples.append(ledger)
            listeners = self._listeners
        for listener in listeners:
            self._call(listener, ledger)
        return ledger

    def _run(self, stop: threading.Event) -> None:
        due = time.monotonic()
        while not stop.is_set():
            try:
                self.sample()
                self._failing = ""
            except Exception as error:  # noqa: BLE001 - sampling outlives whatever an owner or a driver does
                self._note("sampler", error)
            due += 1 / self.hz
            now = time.monotonic()
            if due < now:  # too slow for this rate, or the machine slept: go on from here, not in a burst
                due = now + 1 / self.hz
            stop.wait(due - now)

    def _call(self, listener: Callable[[Ledger], None], ledger: Ledger) -> None:
        try:
            listener(ledger)
        except Exception as error:  # noqa: BLE001 - one listener must not end the others
            self._note("sample listener", error)

    def _note(self, subject: str, error: Exception) -> None:
        """Record a failure once, not ten times a second."""
        told = f"{subject}: {type(error).__name__}: {error}"
        if told != self._failing:
            self._failing = told
            self.record(Event(time.time(), "note", subject, why=f"{type(error).__name__}: {error}"))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(RuntimeError):
            self.stop()


def _sharing(ledger: Ledger, before: Ledger) -> Ledger:
    """The ledger with the row objects of the one before where they are equal: most are, and thousands are kept."""
    known = {row: row for row in before.rows}
    return replace(ledger, rows=tuple(known.get(row, row) for row in ledger.rows))
