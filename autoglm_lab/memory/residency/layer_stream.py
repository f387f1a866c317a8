"""Parts of layers whose weights stay on the host: each comes to the device while what is before it computes.

Two stages on the device take turns, so a part always finds its weights at the same address and a captured step can
bring them itself. Between two passes the stages hold the first parts of the next one.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoglm_lab.errors import ModuleError, OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.host_machine import host_memory
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.residency import weights
from autoglm_lab.memory.residency.binding import placeholder
from autoglm_lab.memory.residency.cuda_slab import CudaSlab
from autoglm_lab.memory.residency.pinned import PinnedBudget
from autoglm_lab.memory.residency.slab import HostSlab, Slab, View, lay_out, views_of
from autoglm_lab.memory.residency.staging import Staging
from autoglm_lab.models.lean_layers import decoder_of
from autoglm_lab.models.placement import STAGES, HostPart
from autoglm_lab.models.tensor_sources import Source
from autoglm_lab.units import format_bytes

_GRAIN = 4096
_SPARE = 256 << 20


@dataclass
class _Stages:
    """What the stages hold, or are getting: a part's number each, and when it will be there (None: it is)."""

    holds: list[int | None] = field(default_factory=lambda: [None] * STAGES)
    come: list[Any] = field(default_factory=lambda: [None] * STAGES)


class LayerStream:
    """Some parts of one model, on the host. Making one takes their tensors over; `fill` gives them values.

    Args:
        parts: in the order in which a forward passes them.
        sources: where the values of their tensors come from, by name.
        pinned: counts the page-locked bytes; without room there, copies are pageable and slower.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[HostPart],
        sources: Mapping[str, Source],
        accelerator: Accelerator,
        pinned: PinnedBudget,
    ) -> None:
        self._parts, self._accelerator = tuple(parts), accelerator
        self._sources = {name: sources[name] for part in parts for name in part.tensors}
        laid = [lay_out(part.tensors) for part in parts]
        self._views: list[dict[str, View]] = [views for views, _ in laid]
        self._sizes = [nbytes for _, nbytes in laid]
        self._slot = -(-max(self._sizes) // _GRAIN) * _GRAIN
        cuda = accelerator.kind == "cuda"
        self._host = HostSlab(self._slot * len(parts), pin=cuda, budget=pinned if cuda else None)
        stages = self._slot * STAGES
        self._stage: Slab = CudaSlab(stages, accelerator.device) if cuda else HostSlab(stages)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._stream: torch.cuda.Stream | None = None
        self._now, self._captured = _Stages(), _Stages()
        self._hooks: list[Any] = []
        for number, part in enumerate(self._parts):
            self._watch(number, part.module)
        self._hooks.append(decoder_of(model).register_forward_hook(self._end, always_call=True))

    @property
    def count(self) -> int:
        """How many parts are on the host."""
        return len(self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes of their weights."""
        return sum(part.nbytes for part in self._parts)

    @property
    def host_bytes(self) -> int:
        return self._host.committed

    @property
    def stage_bytes(self) -> int:
        """Bytes on the device."""
        return self._stage.committed

    def fill(self) -> None:
        """Take the memory, on the host and on the device, and read the weights.

        Raises:
            OutOfMemoryError: the host or the device has no room. Nothing is held.
            LoadError: a file is gone or damaged. Nothing is held.
        """
        needed, free = self._host.size, host_memory()[1]
        if free < needed + _SPARE:
            raise OutOfMemoryError("load", needed, free, ["lower placement.host_bytes"])
        room = self._accelerator.headroom()
        if self._accelerator.kind == "cuda" and room < self._stage.size:
            raise OutOfMemoryError("load", self._stage.size, max(0, room), ["raise placement.host_bytes"])
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._take()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # whose variables still view the memory
            self.close()
            raise

    def settle(self) -> None:
        """Before a captured step is replayed: let the stages hold what it begins with."""
        for number in range(min(STAGES, self.count)):
            self._bring(number, self._now)
        for stage in range(STAGES):
            self._join(stage, self._now)

    def holdings(self) -> Iterator[Row]:
        """Rows of the stages and of the parts on the host (see `ledger.Owner`)."""
        if self._stage.committed:
            counts = f"where {self.count} parts of layers come to from the host, one after the other"
            yield Row("text stages", "weights", "device", self._stage.committed, counts)
        if self._host.committed:
            pinned = "pinned" if self._host.pinned else "pageable"
            yield Row("text layers", "weights", "host", self._host.committed, f"{self.count} parts of layers, {pinned}")

    def close(self) -> None:
        """Give every byte back. The parts cannot be used afterwards."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._accelerator.kind == "cuda" and self._stage.committed:
            torch.cuda.synchronize(self._accelerator.device)
        for part in self._parts:
            for tensor in part.tensors.values():
                tensor.data = placeholder(tensor.dtype, tensor.device).expand(tensor.shape)
        self._copies = []
        held = self._stage.committed
        with self._accelerator.moving():
            self._stage.close()
            if held:
                self._accelerator.hold(-held)
        self._host.close()

    # what it is made of

    def _take(self) -> None:
        try:
            self._host.commit()
            self._host.touch()
        except (MemoryError, OSError):
            raise OutOfMemoryError("load", self._host.size, host_memory()[1], ["lower placement.host_bytes"]) from None
        self._host.pin()
        whole = self._host.alias()
        targets: dict[str, Tensor] = {}
        for number, views in enumerate(self._views):
            targets |= views_of(whole[number * self._slot :], views)
        weights.fill_all(targets, self._sources, Staging(torch.device("cpu")), lambda _: None)
        self._sources = {}
        del targets, whole
        with self._accelerator.moving():
            try:
                region = self._stage.commit()
            except OSError as error:
                raise MemoryError(str(error)) from None
            self._accelerator.hold(self._stage.committed)
        # Made once: nothing but the copy itself is to happen while a step is captured.
        whole, stages = self._host.alias(), self._stage.alias()
        for number, nbytes in enumerate(self._sizes):
            source, target = number * self._slot, number % STAGES * self._slot
            self._copies.append((whole[source : source + nbytes], stages[target : target + nbytes]))
        for number, (part, views) in enumerate(zip(self._parts, self._views, strict=True)):
            there = region[number % STAGES * self._slot :]
            for name, view in views_of(there, views).items():
                part.tensors[name].data = view

    def _watch(self, number: int, module: nn.Module) -> None:
        def enter(*_: Any) -> None:
            stages = self._current()
            if number == 0 and stages is self._captured:
                # A capture runs nothing: what it begins with is what `settle` brings before each replay.
                self._captured.holds = [first if first < self.count else None for first in range(STAGES)]
                self._captured.come = [None] * STAGES
            self._bring(number, stages)
            self._join(number % STAGES, stages)

        def leave(*_: Any) -> None:
            after = number + STAGES
            self._bring(after if after < self.count else number % STAGES, self._current())

        self._hooks.append(module.register_forward_pre_hook(enter, prepend=True))
        self._hooks.append(module.register_forward_hook(leave))
        self._hooks.append(module.register_state_dict_pre_hook(self._refuse_state_dict))

    def _current(self) -> _Stages:
        capturing = self._accelerator.kind == "cuda" and torch.cuda.is_current_stream_capturing()
        return self._captured if capturing else self._now

    def _end(self, *_: Any) -> None:
        """A pass is over: a capture has to join the stream that copies."""
        if self._stream is not None and self._current() is self._captured:
            torch.cuda.current_stream(self._accelerator.device).wait_stream(self._stream)

    def _bring(self, number: int, stages: _Stages) -> None:
        """Let a part's weights come to its stage, once what was queued so far is done with it."""
        stage = number % STAGES
        if stages.holds[stage] == number:
            return
        source, target = self._copies[number]
        stages.holds[stage] = None
        with torch.no_grad():
            if self._accelerator.kind == "cpu":
                target.copy_(source)
            else:
                stages.come[stage] = self._copied(source, target)
        stages.holds[stage] = number

    def _copied(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        device = self._accelerator.device
        growing = self._accelerator.growth("weights from the host", times=2) if self._stream is None else nullcontext()
        with growing:
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
                done = torch.cuda.Event()
                done.record(self._stream)
        return done

    def _join(self, stage: int, stages: _Stages) -> None:
        done, stages.come[stage] = stages.come[stage], None
        if done is not None:
            torch.cuda.current_stream(self._accelerator.device).wait_event(done)

    def _refuse_state_dict(self, *_: Any) -> None:
        raise ModuleError(
            f"state_dict() cannot be read: {format_bytes(self.nbytes)} of the layers stay on the host: load the model "
            "with placement.host_bytes 0"
        )
