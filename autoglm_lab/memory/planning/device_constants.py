"""What a device takes beside a model's own bytes: measured once on real ones, and on this one where it is at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from autoglm_lab.errors import LabError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.host_machine import host_memory
from autoglm_lab.memory.planning.cards import Card, find_card
from autoglm_lab.memory.planning.plan_record import PlanRecord
from autoglm_lab.units import MiB

_HOPPER = ("H100", "H200", "H20", "H800", "GH200")


@dataclass(frozen=True, slots=True)
class PlanDevice:
    """A device to plan for. Bytes throughout.

    Attributes:
        total: what the device has.
        free: what this process may have of it now: less than ``total`` where others hold some.
        context: the process before it holds anything of ours.
        loaded: what the driver takes on top until the weights are there.
        eager: the same when every phase of an answer has been gone through once.
        working: the same where steps were captured: a second stream, and graphs.
        training: the same after a step of training, whose kernels are others.
        workspaces: what cuBLAS keeps in torch's allocator for two streams, the engine's and that of captures.
        estimated: whether the constants were measured on another kind of device.
        host_free: bytes of host memory that can be had beside a GPU; None: not known.
        leftovers: what this process holds that no owner answers for: variables, what Python took since the start.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    total: int
    free: int
    context: int
    loaded: int
    eager: int
    working: int
    training: int
    workspaces: int
    estimated: bool
    leftovers: int = 0
    host_free: int | None = None


# docs/benchmarks.md, "ledger", in the column without owners: what the driver holds beside weights and allocator was
# 678 MiB after loading, 690 after an answer without captured steps, 760 to 770 with them, and 830 after a step of
# training ("plans"); of that, 518 to 660 MiB were there before any tensor.
_CONTEXT, _LOADED, _EAGER, _WORKING, _TRAINING = (size * MiB for size in (570, 108, 120, 190, 260))
# 33.5 MiB a stream on Hopper, in segments of whole 2 MiB; elsewhere cuBLAS asks for 8.1 MiB.
_WORKSPACES, _SMALLER_WORKSPACES = 2 * 34 * MiB, 17 * MiB
# Python with torch and transformers, anonymous memory, on Linux.
_HOST_CONTEXT = 420 * MiB


def plan_device(name: str | torch.device | None, budget: int | None, accelerator: Accelerator | None) -> PlanDevice:
    """The device that ``name`` means.

    Args:
        name: a card (``"RTX 4090"``, see `cards.CARDS`), ``"cuda:0"``, ``"cpu"``; None: this machine's GPU, else a GPU
            of the budget's size where there is a budget, else the CPU.
        accelerator: the device of an open workbench: what was measured there replaces the constants.

    Raises:
        LabError: there is no such device or card; the message lists the cards.
    """
    if accelerator is not None and name is None:
        return measured(accelerator)
    card = find_card(str(name)) if isinstance(name, str) else None
    if card is not None:
        return _of_card(card)
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cuda" if budget is not None else "cpu"
    return _of_torch(str(name), budget)


def measured(accelerator: Accelerator) -> PlanDevice:
    """An open device, with what was measured on it so far; the larger of that and the constants where more may come."""
    reading = accelerator.reading()
    ours = reading.process or 0
    free = min(reading.total, reading.free + ours)
    rows = {row.name: row.nbytes or 0 for row in accelerator.holdings()}
    context, grown = accelerator.context, accelerator.grown.nbytes
    if accelerator.kind == "cpu":
        return _host(accelerator.name, reading.total, free, context, estimated=False)
    device = corrected(_cuda(accelerator.name, reading.total, free))
    more = device.context - context if context else 0
    return replace(
        device,
        context=context or device.context,
        loaded=min(grown, device.loaded) if grown else device.loaded,
        eager=device.eager + more,
        working=max(grown, device.working + more),
        training=max(grown, device.training + more),
        workspaces=max(rows.get("workspaces", 0), device.workspaces),
        estimated=False,
        host_free=host_memory()[1],
    )


def corrected(device: PlanDevice, record: PlanRecord | None = None) -> PlanDevice:
    """The device with what it took for itself in earlier runs on this machine, where there were any."""
    learnt = (record or PlanRecord()).learnt(device.name)
    if learnt is None:
        return device
    if device.kind == "cpu":
        return replace(device, context=learnt.context, estimated=False)
    more = device.context - learnt.context
    return replace(
        device,
        context=learnt.context,
        loaded=min(device.loaded, learnt.grown),
        eager=min(device.eager + more, learnt.grown),
        working=learnt.grown,
        training=max(device.training + more, learnt.grown),
        workspaces=learnt.workspaces or device.workspaces,
        estimated=False,
    )


def _of_card(card: Card) -> PlanDevice:
    return _cuda(card.name, card.usable, card.usable)


def _of_torch(name: str, budget: int | None) -> PlanDevice:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LabError(f"there is no device or card {name!r}: {_known()}") from None
    if device.type == "cpu":
        total, free = host_memory()
        return corrected(_host("CPU, memory of this machine", total, free, _HOST_CONTEXT, estimated=True))
    if device.type != "cuda":
        raise LabError(f"memory on {device.type!r} devices is not planned: {_known()}")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        here = corrected(_cuda(str(properties.name), int(total), int(free) + held))
        return replace(here, host_free=host_memory()[1])
    if budget is None:
        raise LabError(f"there is no GPU here, so its size is not known: give a budget, or {_known()}")
    return _cuda("a CUDA card", budget, budget)


def _cuda(name: str, total: int, free: int) -> PlanDevice:
    hopper = any(chip in name.upper() for chip in _HOPPER)
    spaces = _WORKSPACES if hopper or name == "a CUDA card" else _SMALLER_WORKSPACES
    known = "H200" in name.upper()
    taken = (_CONTEXT, _LOADED, _EAGER, _WORKING, _TRAINING)
    return PlanDevice(name, "cuda", total, free, *taken, spaces, estimated=not known)


def _host(name: str, total: int, free: int, context: int, *, estimated: bool) -> PlanDevice:
    return PlanDevice(name, "cpu", total, free, context, 0, 0, 0, 0, 0, estimated=estimated)


def _known() -> str:
    from autoglm_lab.memory.planning.cards import CARDS

    return f"use 'cuda', 'cpu' or a card: {', '.join(CARDS)}"
