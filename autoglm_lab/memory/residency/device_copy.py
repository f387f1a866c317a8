"""One module's weights on the device: the slab that they lie in, and the model's tensors that point into it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from autoglm_lab.errors import ModuleError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.residency.backing import Backing
from autoglm_lab.memory.residency.binding import Binding
from autoglm_lab.memory.residency.cuda_slab import CudaSlab
from autoglm_lab.memory.residency.mover import Arrival, Mover
from autoglm_lab.memory.residency.slab import HostSlab, Slab, SlabInUseError
from autoglm_lab.models.anatomy import ModuleSpec
from autoglm_lab.models.precision import label
from autoglm_lab.units import format_bytes


class DeviceCopy:
    """The copy that the model computes with. It is empty when made, and the model's tensors point at nothing.

    Args:
        on_use: see `Binding`.

    Attributes:
        binding: the model's tensors.
        slab: the memory.
        changed: whether the weights were written to since they came, as far as is known.
        filled: bytes that have come so far, while they come.
    """

    def __init__(
        self, spec: ModuleSpec, model: nn.Module, accelerator: Accelerator, mover: Mover, on_use: Callable[[str], None]
    ) -> None:
        self._name, self._nbytes, self._card = spec.name, spec.nbytes, spec.card
        self._accelerator, self._mover = accelerator, mover
        self.binding = Binding(spec, model, accelerator.device, on_use)
        nbytes, device = self.binding.nbytes, accelerator.device
        self.slab: Slab = CudaSlab(nbytes, device) if accelerator.kind == "cuda" else HostSlab(nbytes)
        self._kept_in = [label(model, name) for name in spec.tensors]
        self.changed = False
        self.filled = 0
        self.binding.detach()

    @cached_property
    def dtype(self) -> str:
        """What most of the numbers are, as ``bfloat16`` or ``int4``. The sampler asks for it ten times a second."""
        numbers: dict[str, int] = {}
        for spelled, count in self._kept_in:
            numbers[spelled] = numbers.get(spelled, 0) + count
        return max(numbers, key=lambda name: numbers[name], default="none")

    def rows(self, *, moving: bool) -> Iterator[Row]:
        """The ledger's row of what is held on the device."""
        held = self.slab.committed
        if moving and not self._mover.background:
            held = min(self.filled, held)  # the kernel backs memory as it is written
        if held:
            rounding = held - self._nbytes
            counts = "weights on their way" if moving else f"weights in {self.dtype}"
            if rounding > 0 and not moving:
                counts += f", {format_bytes(rounding)} of it rounding to whole pages"
            yield Row(self._name, "weights", "device", held, counts, card=self._card)

    def take(self, backing: Backing) -> Arrival | None:
        """Take the memory, let the weights come, and point the model at them.

        Returns:
            Their arrival; None: they are there.

        Raises:
            MemoryError: there is no memory. Everything is as before.
            LoadError: a file is gone or damaged. Everything is as before.
        """
        with self._accelerator.moving():
            try:
                region = self.slab.commit()
            except OSError as error:
                raise MemoryError(str(error)) from None
            self._accelerator.hold(self.slab.committed)
        self.filled = 0
        try:
            arrival = self._come(backing, region)
        except BaseException as error:
            del region
            traceback.clear_frames(error.__traceback__)  # whose variables still view the slab
            self.slab.seal()
            if self._mover.background:
                torch.cuda.synchronize(self._accelerator.device)  # what filled it may still write
            self.drop()
            raise
        self.binding.attach(region, None if arrival is None else arrival.done)
        self.changed = False
        return arrival

    def _come(self, backing: Backing, region: Tensor) -> Arrival | None:
        if backing.host is not None:
            return self._mover.bring(backing.host.alias(), region)
        with self._accelerator.growth("reading weights", times=2):
            backing.fill(region, self._count, self._mover.staging)
        return self._mover.mark() if self._mover.background else None

    def _count(self, nbytes: int) -> None:
        self.filled += nbytes

    def leave(self, after: torch.cuda.Event | None = None) -> tuple[torch.cuda.Event, ...]:
        """Point the model away, after noting whether the weights were changed. As `withdraw`."""
        self.binding.refuse_while_running()
        self.changed |= self.binding.changed()
        if self.changed:
            with torch.inference_mode(mode=False), torch.no_grad():
                self.binding.gather(self.slab.alias())
        self.filled = self.slab.committed
        return self.withdraw(after)

    def withdraw(self, after: torch.cuda.Event | None = None) -> tuple[torch.cuda.Event, ...]:
        """Point the model away from the slab.

        Args:
            after: see `Streams.uses`.

        Returns:
            What the device has to pass before `drop`.

        Raises:
            ModuleError: a forward pass of another thread runs, or a variable still views the weights. Everything is as
                before.
        """
        self.binding.refuse_while_running()
        uses = self.binding.uses(after)
        self.binding.detach()
        try:
            self.slab.seal()
        except SlabInUseError:
            self.come_back()
            raise ModuleError(
                f"'{self._name}' was not parked: a variable outside the model still views its weights (a slice, "
                "p.detach(), or a graph kept for backward). Delete it and park again"
            ) from None
        return uses

    def come_back(self) -> None:
        """Point the model into the slab again: the weights stay."""
        with torch.inference_mode(mode=False), torch.no_grad():
            self.binding.attach(self.slab.region())

    def fetch(self, target: Tensor) -> None:
        """Copy the region into a host region, and wait for it. Only the mover calls it."""
        self._mover.fetch(self.slab.alias(), target)

    def release(self) -> None:
        """Give the model's tensors memory of torch's own, take the hooks off them, and give the slab back.

        Where the device has no room for both, the values go by way of the host.

        Raises:
            ModuleError: as `withdraw`. Everything is as before.
        """
        self._mover.wait(self.leave())
        values: dict[str, Tensor] = {}
        with torch.inference_mode(mode=False), torch.no_grad():
            try:
                values = self.binding.copies(self.slab.alias())
            except torch.OutOfMemoryError as error:
                traceback.clear_frames(error.__traceback__)  # whose variables still view the slab
            if not values:
                region = self.slab.alias().to("cpu", copy=True)
                self.drop()
                values = self.binding.copies(region)
        if self._mover.background:
            torch.cuda.synchronize(self._accelerator.device)  # the copies may still read the slab
        self.binding.give_away(values)
        self.drop()
        self.slab.close()

    def drop(self) -> None:
        """Give the memory back. The device must be done with it."""
        held = self.slab.committed
        if held:
            with self._accelerator.moving():
                self.slab.drop()
                self._accelerator.hold(-held)
            self.filled = 0
