"""Others' ways to take a module off a GPU and bring it back, on a plain module with the same tensors."""

from __future__ import annotations

import gc
import importlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

_TIMES = 3


@dataclass(frozen=True)
class Offload:
    """Seconds that the caller waits: until the module is off the GPU, until it is on it. None: not told apart."""

    off: float | None
    on: float | None
    both: float | None


class Plain(nn.Module):
    """A module of tensors of the same shapes as ``like``, which lie in memory as any module's do."""

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(
            nn.Parameter(torch.ones(one.shape, dtype=one.dtype), requires_grad=False) for one in like.values()
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def get_memory_footprint(self) -> int:
        return sum(one.nbytes for one in self.tensors)

    def forward(self) -> Tensor:
        """Use one value of every tensor, as cheaply as that goes."""
        return torch.stack([one.view(-1)[0].float() for one in self.tensors]).sum()


def peers(like: Mapping[str, Tensor], device: torch.device) -> tuple[dict[str, Offload], list[str]]:
    """Each peer by its name, and a note for each that cannot be measured here."""
    found, notes = {}, []
    tried: dict[str, Callable[[Mapping[str, Tensor], torch.device], Offload]] = {
        "the article's .to()": _article,
        "accelerate": _accelerate,
        "diffusers": _diffusers,
    }
    for name, measure in tried.items():
        try:
            found[name] = measure(like, device)
        except ImportError as error:
            found[name] = Offload(None, None, None)
            notes.append(f"{name} is not measured: {error}.")
        _empty()
    return found, notes


def _article(like: Mapping[str, Tensor], device: torch.device) -> Offload:
    module = Plain(like).to(device)

    def off() -> None:
        module.to("cpu")
        _empty()

    return _of(off, lambda: module.to(device), device)


def _accelerate(like: Mapping[str, Tensor], device: torch.device) -> Offload:
    from accelerate import cpu_offload_with_hook

    module, hook = cpu_offload_with_hook(Plain(like), device)
    module()

    def off() -> None:
        hook.offload()
        _empty()

    return _of(off, module, device)


def _diffusers(like: Mapping[str, Tensor], device: torch.device) -> Offload:
    """One module goes when another of its size comes: the manager parks nothing by itself."""
    with _quiet():
        manager: Any = importlib.import_module("diffusers").ComponentsManager()
        one, other = Plain(like), Plain(like)
        manager.add("one", one)
        manager.add("other", other)
        manager.enable_auto_cpu_offload(device=device, offload_strategy=lambda hooks, **_: hooks)
        one()
        times = [_timed((other, one)[number % 2], device) for number in range(2 * _TIMES)]
        manager.disable_auto_cpu_offload()
    return Offload(None, None, median(times))


def _of(off: Callable[[], object], on: Callable[[], object], device: torch.device) -> Offload:
    offs, ons = [], []
    for _ in range(_TIMES):
        offs.append(_timed(off, device))
        ons.append(_timed(on, device))
    return Offload(median(offs), median(ons), median(a + b for a, b in zip(offs, ons, strict=True)))


def _timed(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _empty() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what a peer says while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
