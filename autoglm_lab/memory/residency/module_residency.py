"""One module's weights: on the device, or parked; and moving them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import nn

from autoglm_lab.errors import ModuleError, OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event, EventKind
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.residency.backing import Backing, Keeper
from autoglm_lab.memory.residency.device_copy import DeviceCopy
from autoglm_lab.memory.residency.module_info import ModuleInfo
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.memory.residency.mover import Arrival, Mover
from autoglm_lab.memory.residency.pinned import PinnedBudget
from autoglm_lab.models.anatomy import ModuleSpec
from autoglm_lab.models.tensor_sources import Source
from autoglm_lab.units import format_bytes

Place = Literal["device", "host", "disk", "moving"]
Rest = Literal["device", "host", "disk"]
ParkPlace = Literal["auto", "host", "disk"]


class ModuleResidency:
    """Where one module's weights are, and moving them.

    A move that was begun ends on the mover's thread: whoever began it goes on. `info` and `holdings` never wait. Moves
    of one module follow one another: a wake waits for a park under way, a park need not wait for a wake.

    Attributes:
        nbytes: bytes of the weights.
        card: number of the device that they are used on.
        at: ``device``, ``host`` or ``disk``: where they are, or are on their way to. They can be used while they are on
            their way to the device: its work waits for them.
        backing: the copies besides the device's.
    """

    def __init__(
        self,
        spec: ModuleSpec,
        model: nn.Module,
        sources: Mapping[str, Source],
        accelerator: Accelerator,
        keeper: Keeper,
        mover: Mover,
        pinned: PinnedBudget,
    ) -> None:
        self.name, self.nbytes, self.card, self._note = spec.name, spec.nbytes, spec.card, spec.note
        self.at: Rest = "disk"
        self._accelerator, self._keeper, self._mover = accelerator, keeper, mover
        self._device = DeviceCopy(spec, model, accelerator, mover, self._used_while_parked)
        views, size = self._device.binding.views, self._device.slab.size
        budget = pinned if accelerator.kind == "cuda" else None
        self.backing = Backing(spec.name, views, size, sources, keeper, budget)
        self._move: Move | None = None
        self._last_event: Event | None = None
        self._lock = threading.RLock()
        self._released = False

    # what people and the sampler read; no lock is held for it

    @property
    def place(self) -> Place:
        """Where the weights are; ``moving`` while a move is under way."""
        move = self._move
        return self.at if move is None or move.done else "moving"

    @property
    def dtype(self) -> str:
        """The dtype of most of the module's bytes, as ``bfloat16``."""
        return self._device.dtype

    @property
    def last_used(self) -> float:
        """Seconds since the epoch of the last forward pass or wake."""
        return self._device.binding.last_used

    @last_used.setter
    def last_used(self, moment: float) -> None:
        self._device.binding.last_used = moment

    @property
    def filled(self) -> int:
        """Bytes that were read so far of the copy on the device or, where that is not wanted, on the host."""
        return self._device.filled or self.backing.filled

    @property
    def slab_bytes(self) -> int:
        """Bytes that the module takes on the device, rounding to whole pages included."""
        return self._device.slab.size

    def info(self) -> ModuleInfo:
        note = self._note or self.backing.note
        return ModuleInfo(self.name, self.place, self.nbytes, self.dtype, self._last_event, note)

    def holdings(self) -> Iterator[Row]:
        """Rows of this module in every place where it holds bytes."""
        yield from self._device.rows(moving=self.place == "moving")
        yield from self.backing.rows("host")
        if self.place == "disk":
            yield from self.backing.rows("disk")

    # moving

    def park(
        self,
        place: ParkPlace = "auto",
        why: str = "",
        *,
        kind: EventKind = "parked",
        after: torch.cuda.Event | None = None,
    ) -> Move:
        """Take the weights off the device. Beside a GPU this returns while the device may still use them.

        Nothing is copied back unless the weights were changed, were made up, or exist nowhere else; the event says so.

        Args:
            place: ``host`` (pinned; not on a CPU machine, where the device is the host), ``disk``, or ``auto``: host
                beside a GPU, disk on a CPU machine.
            why: the cause, for the event.
            kind: of the event.
            after: see `Streams.uses`.

        Raises:
            ModuleError: a forward pass of another thread runs, a variable still views the weights, or the disk is full
                (beside a GPU the move says that, and an event). The module stays where it was.
        """
        with self._lock:
            self._keeper.check_open()
            target = self.target(place)
            if self.at != "device":
                self._settle()
            if self.at == target:
                return Move.ended(Event(time.time(), kind, self.name, 0, 0.0, f"was on {target} already"))
            start, before = time.perf_counter(), self.at
            uses = self._device.leave(after) if before == "device" else ()
            self.at, self._move = target, Move()
            self._mover.run(self._move, lambda: self._end_park(target, before, uses, start, why, kind))
            return self._move

    def wake(self, why: str = "", *, kind: EventKind = "woke") -> Move:
        """Bring the weights to the device. From a pinned host copy this returns while they come.

        Args:
            why: the cause, for the event.
            kind: of the event: ``loaded`` for the first time.

        Raises:
            OutOfMemoryError: the device has no room within the budget. Everything is as before.
            LoadError: a file is gone or damaged. Everything is as before.
        """
        with self._lock:
            self._keeper.check_open()
            if self.at != "device":
                self._settle()
            if self.at == "device":
                self._device.binding.join()
                if self._move is not None and not self._move.done:
                    return self._move
                return Move.ended(Event(time.time(), kind, self.name, 0, 0.0, "was on the device already"))
            start, reasons = time.perf_counter(), (why, self.backing.origin)
            self._move = Move()
            try:
                with torch.inference_mode(mode=False), torch.no_grad():
                    arrival = self._take()
            except BaseException:
                self._move = None
                raise
            if self.backing.held:
                self.backing.sources = {}  # only the slab has them now; what held them before can go
            self.at, self.last_used = "device", time.time()
            self._mover.run(self._move, lambda: self._end_wake(arrival, start, "; ".join(filter(None, reasons)), kind))
            return self._move

    def join(self) -> None:
        """Let the current stream wait for weights that are on their way."""
        self._device.binding.join()

    def stage(self) -> None:
        """Make the host copy of weights on the device in the background, so that the first park copies nothing.

        On a CPU machine there is nothing to do.
        """
        with self._lock:
            if self._mover.background and self.at == "device" and self.backing.host is None:
                self._mover.run(Move(), self._end_stage)

    def release(self) -> None:
        """Give the model its weights back, on the device, as if they had never been held here.

        Raises:
            ModuleError: as `park`; the module stays.
            OutOfMemoryError: it is parked, and the device has no room. The module stays.
        """
        with self._lock:
            if self._released:
                return
            self.wake("given back to the model").result()
            self._mover.drain()
            self._device.release()
            self._released = True
            self.backing.drop_host()
            self.backing.sources, self._move = {}, None

    def refuse_while_viewed(self) -> None:
        """Raise `ModuleError` where the weights could not leave the slab now."""
        with self._lock:
            self._settle()
            if self.at == "device" and not self._released:
                self._mover.wait(self._device.leave())
                self._device.come_back()

    def close(self) -> None:
        """Give every byte back, for good.

        Raises:
            ModuleError: as `park`; the module stays.
        """
        with self._lock:
            self._mover.drain()
            if self._released:
                return
            if self._device.slab.committed:
                self._mover.wait(self._device.withdraw())
                self._device.drop()
            self._device.slab.close()
            self.backing.drop_host()
            self.backing.sources, self.at, self._move = {}, "disk", None

    def target(self, place: ParkPlace) -> Literal["host", "disk"]:
        """Where parking to ``place`` leads on this machine. Raises `ModuleError` where it cannot."""
        if place not in {"auto", "host", "disk"}:
            raise ModuleError(f"a module is parked to 'auto', 'host' or 'disk', not to {place!r}")
        if self._accelerator.kind == "cpu":
            if place == "host":
                raise ModuleError(
                    "the device is the host on this machine: park to 'disk' (or 'auto', which means disk here)"
                )
            return "disk"
        return "host" if place == "auto" else place

    def _settle(self) -> None:
        """Wait for the move under way."""
        if self._move is not None:
            self._mover.await_end(self._move)

    # how a wake goes on, and ends

    def _take(self) -> Arrival | None:
        needed, had = self._device.slab.size, self._accelerator.headroom()
        if had < needed:
            self._keeper.settle()  # what is being parked makes room
            had = self._accelerator.headroom()
        if had < needed:
            raise OutOfMemoryError("load", needed, max(0, had), self._remedies())
        try:
            return self._device.take(self.backing)
        except MemoryError:
            raise OutOfMemoryError("load", needed, had, self._remedies()) from None

    def _remedies(self) -> list[str]:
        budget = self._accelerator.budget
        remedies = [
            "park another module, or set its residency to 'on-demand' or 'off'",
            "end other programs that use this device" if budget is None else f"raise budget={format_bytes(budget)!r}",
        ]
        return [*remedies, "load with dtype='bfloat16'"] if self.dtype == "float32" else remedies

    def _end_wake(self, arrival: Arrival | None, start: float, why: str, kind: EventKind) -> Event:
        return self._tell(kind, self._device.slab.size, self._mover.end(arrival) - start, why)

    # how a park ends

    def _end_park(
        self,
        target: Literal["host", "disk"],
        before: Rest,
        uses: tuple[torch.cuda.Event, ...],
        start: float,
        why: str,
        kind: EventKind,
    ) -> Event:
        freed = self._device.slab.committed or self.backing.host_bytes
        try:
            self._mover.wait(uses)
            with torch.inference_mode(mode=False), torch.no_grad():
                target, notes = self._secure(target, on_device=before == "device")
                self._device.drop()
        except BaseException as error:
            if before == "device":
                self._device.come_back()
            self.at = before
            if self._mover.background:
                self._keeper.tell(Event(time.time(), "note", self.name, why=f"not parked: {error}"))
            raise
        if target == "disk":
            self.backing.drop_host()
        self.at = target
        reasons = [why, f"to {target}", *notes]
        nbytes = freed or self.backing.host_bytes
        return self._tell(kind, nbytes, time.perf_counter() - start, "; ".join(filter(None, reasons)))

    def _secure(self, target: Literal["host", "disk"], *, on_device: bool) -> tuple[Literal["host", "disk"], list[str]]:
        """Make sure that the weights exist at ``target``, and say what had to be done for it.

        Where the host has no room, the disk is taken instead.
        """
        backing, notes = self.backing, []
        if self._device.changed:
            notes.append("the weights were changed, so they were copied back")
            backing.changed()
        if target == "host" and (backing.host is None or self._device.changed):
            try:
                with self._accelerator.growth("copies to the host", times=2):
                    notes.append(backing.to_host(self._device.fetch if on_device else None))
            except MemoryError as error:
                backing.note = f"on disk instead of the host: {error}"
                notes.append(backing.note)
                target = "disk"
        if target == "disk":
            newest = on_device and (self._device.changed or backing.host is None)
            notes.append(backing.to_disk(self._device.slab.alias if newest else None))
        self._device.changed = False
        return target, notes

    def _end_stage(self) -> Event:
        start = time.perf_counter()
        if self.backing.host is None and self._device.slab.committed:
            try:
                made = self.backing.to_host(self._device.fetch)
            except MemoryError as error:
                made = f"no host copy: {error}"
            return self._tell("note", self.backing.host_bytes, time.perf_counter() - start, made, last=False)
        return Event(time.time(), "note", self.name)

    def _used_while_parked(self, what: str) -> None:
        self._keeper.refuse_if_off(self.name, what)
        self.wake(what)

    def _tell(self, kind: EventKind, nbytes: int, seconds: float, why: str, *, last: bool = True) -> Event:
        event = Event(time.time(), kind, self.name, nbytes, seconds, why)
        if last:
            self._last_event = event
        self._keeper.tell(event)
        return event
