"""The thread that ends moves: it waits for the device, so that nobody else has to."""

from __future__ import annotations

import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.memory.residency.staging import Staging

Job = tuple[Callable[[], Event], Move]
Growth = Callable[[str, int], AbstractContextManager[None]]


def _nothing_grows(what: str, times: int) -> AbstractContextManager[None]:
    del what, times
    return nullcontext()


@dataclass(frozen=True)
class Arrival:
    """Weights on their way to a GPU.

    Attributes:
        done: when the last byte is there; streams wait for it, threads need not.
        issued: `time.perf_counter` when the device was given the copy.
        begun: when the copy began; None where the bytes came otherwise.
    """

    done: torch.cuda.Event
    issued: float
    begun: torch.cuda.Event | None = None

    def wait(self) -> float:
        """Wait for the last byte. Returns the seconds that the copy took; 0 where the bytes came otherwise."""
        self.done.synchronize()
        return 0.0 if self.begun is None else float(self.begun.elapsed_time(self.done)) / 1000


class Mover:
    """Runs the ends of moves, one after the other in the order they were begun.

    Args:
        growth: counts what the driver takes for the first copies, see `Accelerator.growth`.

    Beside a GPU a thread of its own does; it calls nothing that waits for the whole device. Where the device is the
    host there is nothing to wait for: a job has ended when `run` returns, and its error is raised there.

    Attributes:
        background: whether jobs run on a thread of their own.
        copied: seconds that the last copy to the device took by its own clock; 0 before the first.
        staging: what bytes of files pass through on their way to the device.
    """

    def __init__(self, device: torch.device, growth: Growth = _nothing_grows) -> None:
        self._device, self._growth = device, growth
        self.background = device.type == "cuda"
        self.copied = 0.0
        self.staging = Staging(device)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._up: torch.cuda.Stream | None = None
        self._down: torch.cuda.Stream | None = None
        weakref.finalize(self, self._jobs.put, None)

    def run(self, move: Move, job: Callable[[], Event]) -> None:
        """Run ``job`` after those before it; ``move`` ends with its event, or its error."""
        if not self.background:
            try:
                event = job()
            except BaseException as error:
                move.fail(error)
                raise
            move.finish(event)
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_serve, args=(self._jobs,), name="autoglm-lab mover", daemon=True
                )
                self._thread.start()
        self._jobs.put((job, move))

    def await_end(self, move: Move) -> None:
        """Wait until ``move`` has ended, whatever came of it."""
        # Garbage collection may close a model on this very thread, which would wait for itself.
        if threading.current_thread() is not self._thread:
            move.wait()

    def drain(self) -> None:
        """Wait until every move that was begun has ended."""
        if self._thread is not None:
            last = Move()
            self.run(last, lambda: Event(time.time(), "note", "every move has ended"))
            self.await_end(last)

    def close(self) -> None:
        """End the thread, after every move that was begun."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            if threading.current_thread() is not thread:
                thread.join()

    # copies; each stream is made once, since a stream costs driver memory

    def bring(self, source: Tensor, target: Tensor) -> Arrival:
        """Copy a host region to the GPU in one piece, on a stream of its own.

        Streams that compute wait for it; the caller waits only where ``source`` is not pinned.
        """
        with self._growth("copies to the device", 2):
            return self._bring(source, target)

    def _bring(self, source: Tensor, target: Tensor) -> Arrival:
        if self._up is None:
            self._up = torch.cuda.Stream(self._device)
        begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        count = min(source.numel(), target.numel())
        begun.record(self._up)
        issued = time.perf_counter()
        with torch.cuda.stream(self._up):
            target[:count].copy_(source[:count], non_blocking=True)
        done.record(self._up)
        self._await(done)
        return Arrival(done, issued, begun)

    def mark(self) -> Arrival:
        """What the current stream has been given so far, as an arrival."""
        done = torch.cuda.current_stream(self._device).record_event()
        self._await(done)
        return Arrival(done, time.perf_counter())

    def fetch(self, source: Tensor, target: Tensor) -> None:
        """Copy a region of the GPU to the host in one piece, and wait for it. Only jobs call it."""
        if self._down is None:
            self._down = torch.cuda.Stream(self._device)
        count = min(source.numel(), target.numel())
        with torch.cuda.stream(self._down):
            target[:count].copy_(source[:count], non_blocking=True)
        done = torch.cuda.Event(blocking=True)
        done.record(self._down)
        done.synchronize()

    def end(self, arrival: Arrival | None) -> float:
        """Wait until weights are there. Returns when that was, on `time.perf_counter`'s clock. Only jobs call it."""
        if arrival is None:
            return time.perf_counter()
        seconds = arrival.wait()
        if not seconds:
            return time.perf_counter()
        self.copied = seconds
        return arrival.issued + seconds

    def wait(self, events: Iterable[torch.cuda.Event]) -> None:
        """Wait until the device has passed ``events``."""
        for event in events:
            event.synchronize()

    def _await(self, done: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(done)
        torch.cuda.default_stream(self._device).wait_event(done)


def _serve(jobs: queue.SimpleQueue[Job | None]) -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        run, move = job
        try:
            event = run()
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            traceback.clear_frames(error.__traceback__)
            move.fail(error)
        else:
            move.finish(event)
        del job, run, move
