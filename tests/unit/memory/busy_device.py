"""A stand-in for a GPU whose work ends when a test says so; its memory is the host's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.residency import device_copy, residency
from autoglm_lab.memory.residency.mover import Arrival, Growth, Mover
from autoglm_lab.memory.residency.slab import HostSlab


class BusyDevice:
    """What the device does is done while ``idle`` is set. Failing: `fetch` and `wait` raise ``broken``."""

    def __init__(self) -> None:
        self.idle = threading.Event()
        self.idle.set()
        self.broken: Exception | None = None
        self.fetched = self.brought = 0

    def end(self) -> None:
        assert self.idle.wait(30)
        if self.broken is not None:
            raise self.broken


class _Done:
    def __init__(self, device: BusyDevice) -> None:
        self._device = device

    def synchronize(self) -> None:
        self._device.end()

    def query(self) -> bool:
        return self._device.idle.is_set()


def pretend(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator) -> BusyDevice:
    """Let residencies made from now on believe that ``accelerator`` is a GPU."""
    device = BusyDevice()

    class BackgroundMover(Mover):
        def __init__(self, place: torch.device, growth: Growth) -> None:
            super().__init__(place, growth)
            self.background = True

        def bring(self, source: Tensor, target: Tensor) -> Arrival:
            target[: source.numel()].copy_(source[: target.numel()])
            device.brought += 1
            return self.mark()

        def mark(self) -> Arrival:
            return Arrival(_Done(device), time.perf_counter())  # type: ignore[arg-type]

        def fetch(self, source: Tensor, target: Tensor) -> None:
            device.end()
            target[: source.numel()].copy_(source[: target.numel()])
            device.fetched += 1

        def wait(self, events: object) -> None:
            del events
            device.end()

    accelerator.kind = "cuda"
    monkeypatch.setattr(residency, "Mover", BackgroundMover)
    monkeypatch.setattr(device_copy, "CudaSlab", lambda nbytes, _: HostSlab(nbytes))
    registered: Callable[..., int] = lambda *_: 0  # noqa: E731 - a constant answer
    cudart = SimpleNamespace(cudaHostRegister=registered, cudaHostUnregister=registered)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(wait_event=lambda _: None))
    return device
