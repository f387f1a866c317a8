"""Residency: where each module's weights are, and moving them.

Every parameter and persistent buffer of a model lives in its module's slab. Parking drops the slab, waking fills it
again; the Parameter objects stay the same. Weights are read-only at inference, so parking copies nothing back unless
they were changed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from autoglm_lab import progress as bars
from autoglm_lab.errors import LabError, ModuleError, ModuleOffError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.host_machine import host_memory
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.residency import first_load, weights
from autoglm_lab.memory.residency.binding import placeholder
from autoglm_lab.memory.residency.host_weights import HostWeights
from autoglm_lab.memory.residency.module_residency import ModuleResidency
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.memory.residency.mover import Mover
from autoglm_lab.memory.residency.pinned import PinnedBudget
from autoglm_lab.models.anatomy import ModuleSpec, anatomy, named_tensors, parted
from autoglm_lab.models.garbage_collection import no_collection
from autoglm_lab.models.loading import Resolved
from autoglm_lab.models.placement import host_share
from autoglm_lab.models.spread import Spread
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import format_bytes

__all__ = ["ModuleResidency", "Residency"]


class Residency(Mapping[str, ModuleResidency]):
    """The modules of one model, by name, and where their weights are.

    Making one takes the weights over: nothing is on the device until `materialise`, `ensure` or a forward pass. The
    engine's thread moves modules; `info` and `holdings` may be read from any thread at any time.

    Attributes:
        pinned: page-locked host bytes of this model's copies, and how many the policy allows.
        mover: ends the moves on the first device.
        on_host: what of the text stays on the host for good; None: nothing.
    """

    @no_collection()
    def __init__(
        self,
        resolved: Resolved,
        *accelerators: Accelerator,
        policy: MemoryPolicy | None = None,
        on_event: Callable[[Event], None] | None = None,
        spread: Spread | None = None,
    ) -> None:
        self.model = resolved.model
        self.policy = policy or MemoryPolicy()
        self._on_event = on_event
        self._accelerators, self._spread = accelerators, spread
        self._accelerator = accelerators[0]
        self._attached = resolved.attached
        self._folder: Path | None = None
        self._closed = False
        self.pinned = PinnedBudget(_pinned_limit(self.policy))
        self.movers = tuple(Mover(one.device, one.growth) for one in accelerators)
        self.mover = self.movers[0]
        _realise(resolved.model, accelerators, spread)
        whole = anatomy(resolved.model)
        whole = whole if spread is None else parted(resolved.model, whole, spread.of)
        self.on_host = self._host_weights(resolved, whole)
        self.specs = whole if self.on_host is None else tuple(_without(spec, self.on_host) for spec in whole)
        self._modules = {
            spec.name: ModuleResidency(
                spec,
                resolved.model,
                {name: resolved.sources[name] for name in spec.tensors},
                accelerators[spec.card],
                self,
                self.movers[spec.card],
                self.pinned,
            )
            for spec in self.specs
        }
        resolved.sources.clear()  # what was held there belongs to the modules now
        _move_computed_buffers(resolved.model, accelerators, spread)
        if spread is not None:
            from autoglm_lab.models.crossing import cross

            cross(resolved.model, spread)
        self._check(self.policy)

    def __getitem__(self, name: str) -> ModuleResidency:
        try:
            return self._modules[name]
        except KeyError:
            raise ModuleError(f"there is no module {name!r}: this model has {', '.join(self._modules)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def layers(self) -> tuple[int, ...]:
        """Of each layer of the decoder, the number of its device; empty: there is one device."""
        return () if self._spread is None else self._spread.layers

    @no_collection()
    def materialise(self, *, progress: bool | None = False) -> list[Event]:
        """Bring every module to the device that the policy keeps there; each reads only its own tensors.

        Beside a GPU, a module on demand gets its host copy meanwhile, in the background, so that its first wake is as
        fast as every other.

        Args:
            progress: show how far it is, see `progress.shown`.

        Raises:
            OutOfMemoryError: it does not fit, which is known before anything is read; or something else took the
                memory meanwhile: what is there already stays.
            LoadError: a file is gone or damaged.
        """
        modules = list(self._modules.values())
        for card, accelerator in enumerate(self._accelerators):
            first_load.check_room([one for one in modules if one.card == card], self.policy, accelerator)
        shown, far = first_load.expected(modules, self.policy), first_load.Far(modules)
        with contextlib.ExitStack() as open_, bars.shown(progress, "loading", shown, far):
            for mover in self.movers:
                open_.enter_context(mover.staging)
            events = [move.result() for move in self._first_moves()]
        weights.drop_pool()
        if self._attached:
            # The model was there when the accelerator was opened; now its bytes are the slabs' and have rows.
            self._attached = False
            self._accelerator.give_back()
            self._accelerator.read_context()
        return events

    def _first_moves(self) -> list[Move]:
        moves: list[Move] = []
        if self.on_host is not None:
            self.on_host.fill()
        for module in self._modules.values():
            part = self.policy.module(module.name)
            if module.at != "device" and (part.residency == "keep" or module.backing.held):
                moves.append(module.wake("load", kind="loaded"))
            if part.residency == "off" and module.at == "device":
                moves.append(module.park(part.park_to, "off by policy"))
            if part.residency == "on-demand" and module.target(part.park_to) == "host":
                if module.at == "device":
                    module.stage()
                else:
                    module.park(part.park_to, "until it is needed", kind="loaded")
        return moves

    def ensure(self, names: Iterable[str], why: str) -> list[Move]:
        """Wake what a request needs. The current stream's work from now on waits for the weights; no thread does.

        Args:
            names: modules; those that the model lacks are an error.
            why: what they are needed for, as a person would say it: ``an image``.

        Raises:
            ModuleOffError: the policy keeps one of them off. Nothing was moved.
            OutOfMemoryError: the device has no room.
        """
        wanted = [self[name] for name in names]
        for module in wanted:
            self.refuse_if_off(module.name, why)
        moves = []
        for module in wanted:
            module.last_used = time.time()
            if module.at == "device":
                module.join()
            else:
                moves.append(module.wake(why))
        return moves

    def apply(self, policy: MemoryPolicy) -> list[Move]:
        """Obey a policy: wake modules that it keeps, park those that it switches off or parks elsewhere.

        A module on demand stays where it is until it is needed, or idle for its ``keep_alive``; beside a GPU its host
        copy is made in the background meanwhile.

        Raises:
            ModuleError: the policy names a module that this model lacks, or a place that this machine lacks. Nothing
                was moved.
            OutOfMemoryError: what it keeps does not fit. What was moved stays moved, and the policy is as before.
        """
        self._check(policy)
        before, self.policy = self.policy, policy
        self.pinned.limit = _pinned_limit(policy)
        moves = []
        try:
            for module in self._modules.values():
                part = policy.module(module.name)
                stated = part.park_to not in {"auto", module.at}
                if part.residency == "off" and (module.at == "device" or stated):
                    moves.append(module.park(part.park_to, "off by policy"))
                if part.residency == "on-demand" and module.target(part.park_to) == "host":
                    module.stage()
            # What was parked by hand stays so until it is needed, or its own setting changes.
            changed = [m for m in self._modules.values() if policy.module(m.name) != before.module(m.name)]
            absent = [module for module in changed if module.at != "device"]
            moves.extend(m.wake("kept by policy") for m in absent if policy.module(m.name).residency == "keep")
        except BaseException:
            self.policy = before
            self.pinned.limit = _pinned_limit(before)
            raise
        return moves

    def _host_weights(self, resolved: Resolved, specs: tuple[ModuleSpec, ...]) -> HostWeights | None:
        if self._accelerator.kind == "cpu" or self._spread is not None:
            return None
        share = host_share(resolved.model, self.policy.placement.host_bytes)
        text = {name for spec in specs if spec.name == "text" for name in spec.tensors}
        if not share.names or not share.names <= text:
            return None
        return HostWeights(resolved.model, share, resolved.sources, self._accelerator, self.pinned)

    def _check(self, policy: MemoryPolicy) -> None:
        for name, part in policy.modules.items():
            self[name].target(part.park_to)

    def tick(self, now: float) -> list[Move]:
        """Park the on-demand modules that were idle for their ``keep_alive``; ``now`` in seconds since the epoch.

        A module that cannot go now (in use, no room on disk) stays, and is tried again later.
        """
        moves = []
        for module in self._modules.values():
            part = self.policy.module(module.name)
            if part.residency != "on-demand" or module.place != "device" or now - module.last_used < part.keep_alive:
                continue
            try:
                moves.append(module.park(part.park_to, f"idle for {part.keep_alive:g} s"))
            except ModuleError as error:
                module.last_used = now
                event = Event(time.time(), "note", module.name, why=f"not parked: {error}")
                self.tell(event)
                moves.append(Move.ended(event))
        return moves

    def holdings(self) -> Iterator[Row]:
        """Rows of every module (see `ledger.Owner`)."""
        for module in self._modules.values():
            yield from module.holdings()
        if self.on_host is not None:
            yield from self.on_host.holdings()

    def release(self) -> None:
        """Give every module's weights back to the model, on the device. `close` then frees what is left here.

        Raises:
            ModuleError: layers are kept on the host, or a module cannot be moved now. Nothing was given back.
            OutOfMemoryError: a parked module does not fit. Those before it were given back.
        """
        self.check_open()
        if self.on_host is not None:
            raise ModuleError("layers of the text are kept on the host: set placement.host_bytes to 0 and load again")
        for module in self._modules.values():
            module.refuse_while_viewed()
        for accelerator in self._accelerators:
            accelerator.set_budget(None)
        for module in self._modules.values():
            module.release()

    def close(self) -> None:
        """Give every byte back: slabs, host copies, the temporary folder. The model cannot be used afterwards."""
        if self._closed:
            return
        self._closed = True
        problems: list[LabError] = []
        for module in self._modules.values():
            try:
                module.close()
            except LabError as error:
                problems.append(error)
        for mover in self.movers:
            mover.close()
        if self.on_host is not None:
            self.on_host.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if problems:
            raise problems[0]

    # what the modules ask of it

    def refuse_if_off(self, name: str, why: str) -> None:
        if self.policy.module(name).residency == "off":
            raise ModuleOffError(name, why)

    def tell(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def check_open(self) -> None:
        if self._closed:
            raise ModuleError("this model's weights were given back when it was closed: load it again")

    def settle(self) -> None:
        """Wait until every move that was begun has ended."""
        for mover in self.movers:
            mover.drain()

    def spill_path(self, name: str) -> Path:
        """A file for a module's weights in a folder of this process alone, removed when closed."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="autoglm-lab-", dir=_disk()))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / f"{name}-{time.monotonic_ns()}.safetensors"


def _without(spec: ModuleSpec, on_host: HostWeights) -> ModuleSpec:
    """A module less what stays on the host."""
    kept = tuple(name for name in spec.tensors if name not in on_host.names)
    if len(kept) == len(spec.tensors):
        return spec
    note = f"{format_bytes(on_host.nbytes)} more stay on the host"
    nbytes = spec.nbytes - on_host.nbytes
    return replace(spec, tensors=kept, nbytes=nbytes, note="; ".join(filter(None, (spec.note, note))))


def _pinned_limit(policy: MemoryPolicy) -> int:
    return host_memory()[0] // 2 if policy.pinned is None else policy.pinned


def _disk() -> str | None:
    """A folder for temporary files on a real disk; None, the system's own, where there is no better one.

    Many systems keep their temporary folder in memory, where parking would give nothing back to the machine.
    """
    folders = [tempfile.gettempdir(), "/var/tmp", str(Path.home() / ".cache")]  # noqa: S108 - mkdtemp makes it private
    usable = [folder for folder in folders if os.access(folder, os.W_OK)]
    return next((folder for folder in usable if not in_memory(Path(folder))), None)


def in_memory(folder: Path, mounts: str | None = None) -> bool:
    """Whether files in ``folder`` take memory instead of disk (tmpfs), as far as the system tells."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
        except OSError:
            return False
    resolved, kind, longest = folder.resolve(), "", -1
    for line in mounts.splitlines():
        _, mount, filesystem, *_ = line.split()
        depth = len(Path(mount).parts)
        if resolved.is_relative_to(mount) and depth >= longest:
            kind, longest = filesystem, depth
    return kind in {"tmpfs", "ramfs"}


def _realise(model: nn.Module, accelerators: Sequence[Accelerator], spread: Spread | None) -> None:
    """Replace meta parameters by real ones that hold no bytes yet; ties stay."""
    replaced: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in replaced:
                card = 0 if spread is None else spread.of(f"{path}.{name}" if path else name)
                empty = placeholder(parameter.dtype, accelerators[card].device).expand(parameter.shape)
                real = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                real.__dict__.update(parameter.__dict__)
                replaced[id(parameter)] = real
            setattr(module, name, replaced[id(parameter)])


def _move_computed_buffers(model: nn.Module, accelerators: Sequence[Accelerator], spread: Spread | None) -> None:
    """Computed buffers are small and stay where their module runs."""
    persistent = {id(tensor) for _, tensor in named_tensors(model)}
    for path, module in model.named_modules():
        device = accelerators[0 if spread is None else spread.at(path)].device
        for name, buffer in list(module.named_buffers(recurse=False)):
            if id(buffer) not in persistent and buffer.device != device:
                setattr(module, name, buffer.to(device))
