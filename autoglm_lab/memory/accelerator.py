"""One device: how much memory it has, who holds it, how much this process may use.

CUDA is read through NVML and the allocator's counters; where there is no GPU, the device is the host and this process's
anonymous memory counts. Nothing here synchronises the device, except giving memory back.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

from autoglm_lab.errors import LabError
from autoglm_lab.memory.cuda_machine import CudaMachine
from autoglm_lab.memory.growth import DriverGrowth
from autoglm_lab.memory.high_water import high_water
from autoglm_lab.memory.host_machine import HostMachine
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.reading import Counters, Reading
from autoglm_lab.units import MiB

__all__ = ["Accelerator", "Counters", "Reading", "open_accelerator"]

_TRIES = 3
_FIRST, _AGAIN = 16 * MiB, 4 * MiB
"""Left of a budget while something is done for the first time, and later on: CUDA loads kernels when they are launched,
and what they take can be counted only afterwards. A second image of the same size was seen to take 2 MiB more.
"""


class Accelerator:
    """One device of this process. Open it before anything large is allocated: `context` is read then.

    Attributes:
        context: bytes that the process held on the device before it held anything of ours.
        grown: what the driver took for this process since, by event.
        budget: most bytes that the process may use on the device; None: the whole device.
        notes: what this machine cannot tell, one sentence each.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
        self.budget: int | None = None
        self._taken, self._unsure = 0, False
        self._growing: list[int] = []
        self._slabs = self._moves = self._moving = 0
        self._lock = threading.Lock()
        self._machine: CudaMachine | HostMachine
        self._machine = CudaMachine(device) if self.kind == "cuda" else HostMachine()
        self.name, self.total, self.context = self._machine.name, self._machine.total, self._machine.context
        self.notes = self._machine.notes
        self.grown = DriverGrowth(self._beyond_context)

    # what is held

    def reading(self) -> Reading:
        """The device's figures now. Cheap: some 0.05 ms on CPU."""
        if isinstance(self._machine, CudaMachine):
            return self._machine.reading(self._slabs, self.context)
        return self._machine.reading(self._slabs)

    def counters(self) -> Counters:
        """What our own counters say now, without asking the driver or the kernel."""
        allocated, reserved = self._machine.allocator() if isinstance(self._machine, CudaMachine) else (0, 0)
        return Counters(self._slabs, allocated, reserved, self._moves, self._moving > 0)

    def holdings(self) -> Iterator[Row]:
        """Rows of what belongs to the device itself: context, what the driver took later, cuBLAS's workspaces."""
        if isinstance(self._machine, CudaMachine) and self._machine.workspaces:
            yield Row("workspaces", "owner", "device", self._machine.workspaces, _WORKSPACES, within="allocator")
        yield Row("context", "context", "device", self.context, _CONTEXT[self.kind])
        grown = self.grown.nbytes
        if grown:
            counts = f"taken by CUDA and its libraries later, read before and after: {self.grown}"
            yield Row("driver growth", "context", "device", grown, counts)

    def read_context(self) -> None:
        """Read `context` anew: what the process holds now, without weights and without torch's allocator."""
        gc.collect()
        if self.kind == "cpu":
            self._machine.trim()
        held = self._driver_bytes()
        if held:
            self.context = held
            self.grown.forget()

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Open while memory outside torch's allocator is mapped or unmapped, up to its `hold`: a ledger read
        meanwhile is read again, and so is the driver's growth. From any thread; brackets may overlap.
        """
        with self._lock:
            self._moving += 1
        try:
            yield
        finally:
            with self._lock:
                self._moving -= 1
                self._moves += 1
                still = self._moving > 0
            if self._unsure and not still:
                self.count_driver()

    def hold(self, nbytes: int) -> None:
        """Count bytes of weights and pages outside the allocator: mapped (positive) or given back (negative)."""
        with self._lock:
            self._slabs += nbytes
            self._moves += 1
        high_water(self.device).moved(nbytes)
        if self.budget is not None:
            self._apply_budget()

    # what CUDA takes for itself

    def growth(self, what: str, times: int | None = None) -> AbstractContextManager[None]:
        """Count what the driver takes for itself meanwhile as ``what``, a part of the row ``driver growth``.

        For the first use of kernels, for streams, for captured graphs: ``with accelerator.growth("first prefill"):``.
        It waits for nothing (loading a kernel ends before its launch returns) and costs two readings of the process,
        some 0.1 ms; brackets may lie in one another, and each counts its own. Nothing on a CPU, nor where the driver
        hides what a process holds.

        Args:
            what: the event, as the row names it. The same name again adds to it.
            times: measure only this many uses of the name, then cost nothing; None: every one.
        """
        if not isinstance(self._machine, CudaMachine) or self._machine.hidden:
            return nullcontext()
        before = self.grown.times(what)
        return (
            nullcontext() if times is not None and before >= times else self._grow(what, _AGAIN if before else _FIRST)
        )

    @contextmanager
    def _grow(self, what: str, left: int) -> Iterator[None]:
        try:
            self._growing.append(left)
            if self.budget is not None:
                self._apply_budget()
            with self.grown.during(what):
                yield
        finally:
            self._growing.remove(left)
            self.count_driver()

    def warm_up(self) -> None:
        """Let CUDA's libraries take what they need for this thread and its current stream, as rows of their own.

        Call it once on each thread, and in each stream, that computes: before that, cuBLAS's workspaces (32 MiB on
        Hopper) would be bytes without an owner. Nothing on a CPU.
        """
        if isinstance(self._machine, CudaMachine):
            with self.growth("libraries"):
                self._machine.take_workspaces()

    def _driver_bytes(self) -> int | None:
        """What the process holds beside torch's allocator and the slabs, from figures of one moment; None: the driver
        hides it, or slabs were mapped or unmapped all the while: their bytes would count as the driver's.
        """
        for _ in range(_TRIES):
            before = self.counters()
            process = self._machine.process_bytes()
            after = self.counters()
            if process is None:
                return None
            if before == after and not after.moving:
                return process - after.reserved - after.slabs
        return None

    def _beyond_context(self) -> int | None:
        held = self._driver_bytes()
        return None if held is None else held - self.context

    # what may be held

    def headroom(self) -> int:
        """Bytes that this process may still take on the device: what is free, and no more than its budget leaves.

        On CUDA, what the allocator caches counts as available to the allocator but not here.
        """
        reading = self.reading()
        if self.budget is None or reading.process is None:
            return reading.free
        return min(reading.free, self.budget - reading.process)

    def set_budget(self, nbytes: int | None) -> None:
        """Cap what this process may use on the device, its context and weights included; None: the whole device.

        On CUDA the allocator itself refuses to go beyond what context, driver growth, weights and pages leave of it. On
        CPU the kernel does not enforce it: weights and pages are checked against it when they come in, and the engine
        checks between its steps. A budget below what is held takes nothing away: it refuses whatever comes next.
        """
        self.budget = nbytes
        self._count_driver()

    def count_driver(self) -> None:
        """Take what the driver holds for this process off the allocator's cap, where there is one. From any thread."""
        if self.budget is not None:
            self._count_driver()

    def _count_driver(self) -> None:
        # What the driver took outside of every bracket has no name, but takes its part of a card all the same. While
        # slabs move it cannot be told: what it held before counts until they have.
        driver = self._driver_bytes()
        self._unsure = driver is None
        self._taken = max(self.context + self.grown.nbytes, self._taken if driver is None else driver)
        self._apply_budget()

    def _apply_budget(self) -> None:
        if isinstance(self._machine, CudaMachine):
            left = max([*self._growing], default=0)
            cap = None if self.budget is None else self.budget - self._slabs - self._taken - left
            self._machine.cap_allocator(cap)

    def empty_cache(self) -> None:
        """Give back what torch's allocator holds in no tensor. Nothing on a CPU."""
        if isinstance(self._machine, CudaMachine):
            self._machine.trim()

    def give_back(self) -> int:
        """Return cached, unused memory to the system.

        Returns:
            bytes that really left this process on the device, as the driver or the kernel reports them.
        """
        before = self.reading()
        gc.collect()
        self._machine.trim()
        after = self.reading()
        if before.process is None or after.process is None:
            return after.free - before.free
        return before.process - after.process


def open_accelerator(device: str | torch.device | None = None) -> Accelerator:
    """The device to work on.

    Args:
        device: None: ``cuda:0`` if there is one, else ``cpu``.

    Raises:
        LabError: the device does not exist here, or is neither CUDA nor the CPU.
    """
    chosen = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        chosen = torch.device("cuda", chosen.index or 0)
        if (chosen.index or 0) >= count:
            raise LabError(f"there is no device {chosen}: torch {torch.__version__} sees {count} CUDA devices here")
    elif chosen.type != "cpu":
        raise LabError(f"memory on {chosen.type!r} devices is not measured here: use 'cuda' or 'cpu'")
    return Accelerator(chosen)


_CONTEXT = {
    "cuda": "CUDA context and libraries of this process, read once before the first allocation",
    "cpu": "Python and its libraries when the workbench started (anonymous memory), read once",
}
_WORKSPACES = "kept by cuBLAS for the engine's thread and streams, taken from torch's allocator; measured once"
