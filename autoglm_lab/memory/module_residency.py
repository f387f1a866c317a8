"""One module's weights: in its slab on the device, in a host copy, or on disk only."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from autoglm_lab.errors import ModuleError, OutOfMemoryError
from autoglm_lab.memory import weights
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.binding import Binding
from autoglm_lab.memory.cuda_slab import CudaSlab
from autoglm_lab.memory.events import Event, EventKind
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.module_info import ModuleInfo
from autoglm_lab.memory.slab import HostSlab, Slab, SlabInUseError, views_of
from autoglm_lab.models.anatomy import ModuleSpec
from autoglm_lab.models.checkpoint import FileTensor
from autoglm_lab.models.loading import DummyTensor, HeldTensor, Source
from autoglm_lab.units import format_bytes

Place = Literal["device", "host", "disk", "moving"]
ParkPlace = Literal["auto", "host", "disk"]


class Keeper(Protocol):
    """What a module asks of the `Residency` that it belongs to."""

    def refuse_if_off(self, name: str, why: str) -> None: ...
    def tell(self, event: Event) -> None: ...
    def check_open(self) -> None: ...
    def spill_path(self, name: str) -> Path: ...


class ModuleResidency:
    """Where one module's weights are, and moving them.

    Two moves at once are safe: the second waits for the first. `info` and `holdings` never wait.

    Attributes:
        nbytes: bytes of the weights.
        place: ``device``, ``host`` or ``disk``; ``moving`` while a move is under way.
    """

    def __init__(
        self,
        spec: ModuleSpec,
        model: nn.Module,
        sources: Mapping[str, Source],
        accelerator: Accelerator,
        keeper: Keeper,
    ) -> None:
        self.name, self.nbytes, self._note = spec.name, spec.nbytes, spec.note
        self.place: Place = "disk"
        self._accelerator, self._keeper = accelerator, keeper
        self._sources = dict(sources)
        self._binding = Binding(spec, model, accelerator.device, self._used_while_parked)
        nbytes, device = self._binding.nbytes, accelerator.device
        self._slab: Slab = CudaSlab(nbytes, device) if accelerator.kind == "cuda" else HostSlab(nbytes)
        self._host: HostSlab | None = None
        self._filled = 0
        self._last_event: Event | None = None
        self._lock = threading.RLock()
        self._binding.detach()

    # what people and the sampler read; no lock is held for it

    @property
    def dtype(self) -> str:
        """The dtype of most of the module's bytes, as ``bfloat16``."""
        by_dtype: dict[str, int] = {}
        for view in self._binding.views.values():
            spelled = str(view.dtype).removeprefix("torch.")
            by_dtype[spelled] = by_dtype.get(spelled, 0) + view.nbytes
        return max(by_dtype, key=lambda name: by_dtype[name], default="none")

    @property
    def last_used(self) -> float:
        """Seconds since the epoch of the last forward pass or wake."""
        return self._binding.last_used

    @last_used.setter
    def last_used(self, moment: float) -> None:
        self._binding.last_used = moment

    @property
    def held(self) -> bool:
        """Whether the weights still lie where someone else put them (an attached model)."""
        sources = self._sources.values()
        return bool(sources) and all(isinstance(source, HeldTensor) for source in sources)

    def info(self) -> ModuleInfo:
        host = self._host
        note = self._note or (host.note if host is not None else "")
        return ModuleInfo(self.name, self.place, self.nbytes, self.dtype, self._last_event, note)

    def holdings(self) -> Iterator[Row]:
        """Rows of this module in every place where it holds bytes."""
        moving = self.place == "moving"
        on_device = min(self._filled, self._slab.committed) if moving else self._slab.committed
        if on_device:
            rounding = on_device - self.nbytes
            counts = "weights on their way" if moving else f"weights in {self.dtype}"
            if rounding > 0 and not moving:
                counts += f", {format_bytes(rounding)} of it rounding to whole pages"
            yield Row(self.name, "weights", "device", on_device, counts)
        host = self._host
        if host is not None and host.committed:
            counts = "host copy, pinned" if host.pinned else "host copy, pageable"
            yield Row(self.name, "weights", "host", host.committed, counts)
        sources = self._sources
        if self.place == "disk" and sources:
            on_disk = sum(source.nbytes for source in sources.values() if isinstance(source, FileTensor))
            yield Row(self.name, "weights", "disk", on_disk, "in safetensors, read when the module wakes")

    # moving

    def park(self, place: ParkPlace = "auto", why: str = "") -> Event:
        """Take the weights off the device.

        Nothing is copied back unless the weights were changed, were made up, or exist nowhere else; the event says so.

        Args:
            place: ``host`` (pinned; not on a CPU machine, where the device is the host), ``disk``, or ``auto``: host
                beside a GPU, disk on a CPU machine.
            why: the cause, for the event.

        Raises:
            ModuleError: a forward pass of another thread runs, a variable still views the weights, or the disk is full.
                The module stays where it was.
        """
        with self._lock:
            self._keeper.check_open()
            target = self.target(place)
            if self.place == target:
                return Event(time.time(), "parked", self.name, 0, 0.0, f"was on {target} already")
            self._binding.refuse_while_running()
            start, before = time.perf_counter(), self.place
            host_bytes = self._host.committed if self._host is not None else 0
            freed = self._slab.committed or host_bytes
            self._filled, self.place = self._slab.committed, "moving"
            try:
                with torch.inference_mode(mode=False), torch.no_grad():
                    notes = self._secure(target, before)
                    self._release_device()
            except BaseException:
                self.place = before
                raise
            if target == "disk" and self._host is not None:
                self._host.close()
                self._host = None
            self.place = target
            reasons = [why, f"to {target}", *notes]
            return self._tell("parked", freed, start, "; ".join(reason for reason in reasons if reason))

    def wake(self, why: str = "", *, kind: EventKind = "woke") -> Event:
        """Bring the weights to the device.

        Args:
            why: the cause, for the event.
            kind: of the event: ``loaded`` for the first time.

        Raises:
            OutOfMemoryError: the device has no room within the budget. Everything is as before.
            LoadError: a file is gone or damaged. Everything is as before.
        """
        with self._lock:
            self._keeper.check_open()
            if self.place == "device":
                return Event(time.time(), kind, self.name, 0, 0.0, "was on the device already")
            start, before = time.perf_counter(), self.place
            origin = self._origin(before)
            self._filled, self.place = 0, "moving"
            try:
                with torch.inference_mode(mode=False), torch.no_grad():
                    self._take_device()
            except BaseException:
                self.place = before
                raise
            if self.held:
                self._sources = {}  # only the slab has them now; what held them before can go
            self.place, self.last_used = "device", time.time()
            reasons = (why, origin)
            return self._tell(kind, self._slab.committed, start, "; ".join(reason for reason in reasons if reason))

    def close(self) -> None:
        """Give every byte back, for good.

        Raises:
            ModuleError: as `park`; the module stays.
        """
        with self._lock:
            self._binding.refuse_while_running()
            self._release_device()
            self._slab.close()
            if self._host is not None:
                self._host.close()
                self._host = None
            self._sources, self.place = {}, "disk"

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

    def _origin(self, before: Place) -> str:
        if before == "host":
            return "from host"
        kinds = {type(source) for source in self._sources.values()}
        return "from disk" if FileTensor in kinds else "made up" if DummyTensor in kinds else "from this process"

    def _take_device(self) -> None:
        needed, had = self._slab.size, self._accelerator.headroom()
        if had < needed:
            raise OutOfMemoryError("load", needed, max(0, had), self._remedies())
        try:
            region = self._slab.commit()
        except (MemoryError, OSError):
            raise OutOfMemoryError("load", needed, had, self._remedies()) from None
        self._accelerator.hold(self._slab.committed)
        try:
            if self._host is not None and self._host.committed:
                _copy(self._host.region(), region)
            else:
                self._fill(region)
        except BaseException as error:
            held = self._slab.committed
            del region
            traceback.clear_frames(error.__traceback__)  # whose variables still view the slab
            self._slab.release()
            self._accelerator.hold(-held)
            raise
        self._binding.attach(region)

    def _fill(self, region: Tensor) -> None:
        for name, target in views_of(region, self._binding.views).items():
            weights.fill(target, self._sources[name], self._count)

    def _count(self, nbytes: int) -> None:
        self._filled += nbytes

    def _remedies(self) -> list[str]:
        budget = self._accelerator.budget
        remedies = [
            "park another module, or set its residency to 'on-demand' or 'off'",
            "end other programs that use this device" if budget is None else f"raise budget={format_bytes(budget)!r}",
        ]
        return [*remedies, "load with dtype='bfloat16'"] if self.dtype == "float32" else remedies

    def _secure(self, target: Literal["host", "disk"], before: Place) -> list[str]:
        """Make sure that the weights exist at ``target``, and say what had to be done for it."""
        notes = []
        changed = before == "device" and self._binding.changed(self._slab.region())
        if changed:
            notes.append("the weights were changed, so they were copied back")
            self._sources = {}
        if target == "host":
            if self._host is None or changed:
                self._copy_to_host(before)
                notes += ["first host copy made"] * (before == "device" and not changed)
            return notes
        backed = all(isinstance(self._sources.get(name), FileTensor | HeldTensor) for name in self._binding.views)
        if not backed:
            self._spill(before)
            notes.append("written to disk first")
        return notes

    def _copy_to_host(self, before: Place) -> None:
        host = self._host or HostSlab(self._slab.size, pin=True)
        fresh = not host.committed
        region = host.commit() if fresh else host.region()
        try:
            if before == "device":
                current = self._binding.current()
                for name, target in views_of(region, self._binding.views).items():
                    target.copy_(current[name])
            else:
                self._fill(region)
        except BaseException as error:
            if fresh:
                del region
                traceback.clear_frames(error.__traceback__)  # whose variables still view the slab
                host.close()
            raise
        host.pin()
        self._host = host

    def _spill(self, before: Place) -> None:
        """Write the weights to a file of this process. ``before`` is where they are."""
        start = time.perf_counter()
        path = self._keeper.spill_path(self.name)
        if before == "device" or self._host is None:
            tensors = self._binding.current()
        else:
            tensors = views_of(self._host.region(), self._binding.views)
        self._sources = dict(weights.write(path, tensors))
        why = f"the only other copy, in {path.parent}"
        self._keeper.tell(Event(time.time(), "spilled", self.name, self.nbytes, time.perf_counter() - start, why))

    def _release_device(self) -> None:
        held = self._slab.committed
        if not held:
            return
        self._binding.detach()
        try:
            self._slab.release()
        except SlabInUseError:
            self._binding.attach(self._slab.region())
            raise ModuleError(
                f"'{self.name}' was not parked: a variable outside the model still views its weights (a slice, "
                "p.detach(), or a graph kept for backward). Delete it and park again"
            ) from None
        self._accelerator.hold(-held)
        self._filled = 0

    def _used_while_parked(self, what: str) -> None:
        self._keeper.refuse_if_off(self.name, what)
        self.wake(what)

    def _tell(self, kind: EventKind, nbytes: int, start: float, why: str) -> Event:
        event = Event(time.time(), kind, self.name, nbytes, time.perf_counter() - start, why)
        self._last_event = event
        self._keeper.tell(event)
        return event


def _copy(source: Tensor, target: Tensor) -> None:
    """A whole region in one copy, on a stream of its own; the streams that compute wait for it, the caller too."""
    stream = torch.cuda.Stream(target.device)
    count = min(source.numel(), target.numel())
    with torch.cuda.stream(stream):
        target[:count].copy_(source[:count], non_blocking=True)
        done = stream.record_event()
    torch.cuda.current_stream(target.device).wait_event(done)
    torch.cuda.default_stream(target.device).wait_event(done)
    done.synchronize()
