"""The service beside clients that a stranger may send: nothing breaks, nothing is wrong, nothing stays."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.report import Figure
from autoglm_lab.bench.service_clients import run_clients
from autoglm_lab.bench.soak import at_rest, fill_ring, slope_of
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.serving import serve
from autoglm_lab.units import MiB
from autoglm_lab.workbench import Workbench

_CLIENTS, _SEED = 16, 2026
_JUDGED_SECONDS, _WARM_SECONDS = 600.0, 30.0
_SETTLE_SECONDS, _NAP = 30.0, 0.2
_LOOKS, _BETWEEN = 5, 0.03
_OWNED = ("weights", "kv", "owner")
# Small limits, so that clients meet every one of them.
_SETTINGS: dict[str, Any] = {
    "api_key": "clients",
    "admin_key": "admin",
    "running": 8,
    "waiting": 6,
    "body_bytes": 1_000_000,
    "stored_bytes": 200_000,
}
_FAILURES = ('code="internal"', 'code="out_of_memory"', 'code="closed"')


@dataclass(frozen=True)
class Remains:
    """What there is when nobody asks: bytes of owners, threads, open files, conversations."""

    owned: int
    threads: frozenset[threading.Thread]
    files: int
    conversations: tuple[str, ...]

    @classmethod
    def of(cls, workbench: Workbench) -> Remains:
        """Now. Conversations are named and then forgotten, and what is kept between turns is freed."""
        names = tuple(info.name for info in workbench.conversations)
        bytes_of = owned(at_rest(workbench))
        return cls(bytes_of, frozenset(threading.enumerate()), _open_files(), names)

    def beyond(self, before: Remains) -> list[str]:
        """What is here and was not before."""
        found = [f"thread {thread.name}" for thread in self.threads - before.threads if thread.is_alive()]
        found += [f"conversation {name}" for name in set(self.conversations) - set(before.conversations)]
        return found + [f"{self.files - before.files} files"] * (self.files > before.files)


def _open_files() -> int:
    """Files that stay open: some are for a moment, when memory is sampled or a plan is kept."""
    counts = []
    for _ in range(_LOOKS):
        counts.append(psutil.Process().num_fds())
        time.sleep(_BETWEEN)
    return min(counts)


def soak_figures(bench: Bench, workbench: Workbench, bodies: list[dict[str, Any]]) -> list[Figure]:
    """Polite and rude clients for ``bench.soak`` seconds, at a service of its own.

    The same clients warm it up first; then what there is is counted, and counted again when the last client has gone
    and the service has stopped.
    """
    seconds = bench.soak or 0.0
    # What is kept between turns is to be full early, so that what still grows is not that.
    workbench.policy = workbench.policy.replace(kv={"prefix_bytes": 4 * MiB, "encoder_bytes": MiB})
    bench.say("soak: warm-up")
    _served(workbench, bodies, min(_WARM_SECONDS, seconds), _SEED + 1000, [])
    if seconds >= _JUDGED_SECONDS:
        fill_ring(workbench)
    before = Remains.of(workbench)
    bench.say(f"soak: {seconds:g} s of clients that vanish, send garbage and go over limits")
    points: list[tuple[float, int]] = []
    done, faults = _served(workbench, bodies, seconds, _SEED, points)
    after, left = _settled(workbench, before)
    slope = 60 * slope_of([point for point in points if point[0] >= seconds / 2]) / 1e6
    faults += [f"{count} x {what}" for what, count in done["failed"].items()]
    bench.say("rude clients: " + ", ".join(f"{count} {what}" for what, count in sorted(done["others"].items())))
    grown = after.owned - before.owned
    return [
        Figure("soak: right answers beside rude clients", "", done["right"]),
        Figure("soak: wrong answers", "", done["wrong"], bar="none", meets=done["wrong"] == 0),
        Figure("soak: polite clients told to come back (429)", "", done["retried"]),
        Figure("soak: rude clients", "", sum(done["others"].values())),
        Figure(_named("soak: failures of the service", faults), "", len(faults), bar="none", meets=not faults),
        Figure("soak: owners' bytes beyond the warm-up", "B", grown, bar="0", meets=grown <= 0),
        Figure(_named("soak: threads, files, conversations left", left), "", len(left), bar="none", meets=not left),
        Figure(
            "soak: slope of anonymous memory over the second half",
            "MB/min",
            slope,
            bar="<= 1 MB a minute in 10 minutes",
            meets=slope <= 1.0 if seconds >= _JUDGED_SECONDS else None,
        ),
    ]


def owned(ledger: Ledger) -> int:
    """Bytes of everything that has an owner."""
    return sum(row.nbytes or 0 for row in ledger.on("device") if row.kind in _OWNED)


def _served(
    workbench: Workbench, bodies: list[dict[str, Any]], seconds: float, seed: int, points: list[tuple[float, int]]
) -> tuple[dict[str, Any], list[str]]:
    """Let the clients at a service: what they saw, and what it calls its own failures.

    Args:
        points: gets the seconds since the start and the process's bytes, once a second.
    """
    with _errors_logged() as logged, serve(workbench, port=0, **_SETTINGS) as service:
        with _watched(workbench, points):
            done = run_clients(
                "soak",
                url=service.url,
                key=_SETTINGS["api_key"],
                bodies=bodies,
                clients=_CLIENTS,
                seconds=seconds,
                seed=seed,
                body_bytes=_SETTINGS["body_bytes"],
            )
        said = _metrics(service.url)
    counts = [line for line in said.splitlines() if any(mark in line for mark in _FAILURES) and "_created" not in line]
    return done, [*counts, *logged]


def _metrics(url: str) -> str:
    key = {"authorization": f"Bearer {_SETTINGS['api_key']}"}
    return httpx.get(url.removesuffix("/v1") + "/metrics", headers=key, trust_env=False, timeout=60).text


def _settled(workbench: Workbench, before: Remains) -> tuple[Remains, list[str]]:
    """What is left, once nothing more goes away by itself."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        after = Remains.of(workbench)
        left = after.beyond(before)
        if (not left and after.owned <= before.owned) or time.monotonic() > deadline:
            return after, left
        time.sleep(_NAP)


def _named(name: str, found: Sequence[str]) -> str:
    return name + (f" ({'; '.join(found)[:300]})" if found else "")


@contextmanager
def _watched(workbench: Workbench, points: list[tuple[float, int]]) -> Iterator[None]:
    over, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not over.wait(1.0):
            process = workbench.memory.process
            if process is not None:
                points.append((time.monotonic() - began, process))

    watcher = threading.Thread(target=watch, name="soak watch")
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@contextmanager
def _errors_logged() -> Iterator[list[str]]:
    """What any library logs as an error meanwhile: the first line of each."""
    found: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(f"{record.name}: {record.getMessage().splitlines()[0][:100]}")

    ear = Ear(logging.ERROR)
    logging.getLogger().addHandler(ear)
    try:
        yield found
    finally:
        logging.getLogger().removeHandler(ear)
