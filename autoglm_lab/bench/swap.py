"""A module parked and woken: how long the caller waits, when the bytes are back, how fast they come, what is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import psutil
import torch
from torch import Tensor

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.offload import Offload, peers
from autoglm_lab.bench.prompts import screen
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.errors import LabError
from autoglm_lab.memory.nvml import NvmlDevice, visible_device
from autoglm_lab.workbench import Workbench

_MODULE = "vision"
_PATIENCE = 5.0
_BEGUN = 8
_REST = 0.05
"""Seconds between a park and the wake that is timed."""


@dataclass(frozen=True)
class Parked:
    """One park: seconds until the caller went on, and until the driver showed the bytes back (None: it never did)."""

    waited: float
    back: float | None


def run(bench: Bench) -> Report:
    """Vision is parked and woken idle, while a turn decodes, and for requests with an image."""
    wb = bench.workbench
    wb.policy = wb.policy.replace(reclaim={"every_answers": None, "cached_share": None}, generation={"eos": False})
    parks, pairs, cycles = (3, 1, 5) if bench.small else (20, 16, 1000)
    module = wb.engine.state.residency[_MODULE]
    _park_and_wake(wb)  # makes the host copy, and reserves the addresses
    bench.say("parks and wakes, idle")
    idle = [_park(bench, wb) for _ in range(parks)]
    wakes, copies = _wakes(bench, wb, parks)
    bare = _bare(bench, wb) if bench.cuda else None
    bench.say("parks while a turn decodes")
    with _decoding(wb, 1000 if bench.small else 8000):
        busy = [_park(bench, wb) for _ in range(parks)]
    bench.say("requests with an image, vision on demand")
    resident, on_demand = _requests(bench, wb, pairs)
    bench.say(f"{cycles} cycles")
    same, lost_device, lost_host = _cycles(bench, wb, cycles)
    others: dict[str, Offload] = {}
    notes: list[str] = []
    if bench.cuda:
        bench.say("peers")
        like = {name: one.detach().to("meta") for name, one in _tensors(wb).items()}
        wb.modules[_MODULE].park().result()
        others, notes = peers(like, bench.device)
        wb.modules[_MODULE].wake().result()
    else:
        notes.append("On a CPU the device is the host: a module goes to disk, and nothing happens in the background.")
    nbytes = module.nbytes
    offs = {name: peer.off for name, peer in others.items()}
    ons = {name: peer.on for name, peer in others.items()}
    both = {name: peer.both for name, peer in others.items()}
    whole, copy = nbytes / median(wakes), nbytes / median(copies) if all(copies) else None
    figures = [
        *_waits("idle", idle, offs, bench),
        *_waits("while a turn decodes", busy, {}, bench),
        Figure("wake: from asked to usable", "s", median(wakes), ons),
        Figure("park and wake together", "s", median(wakes) + median(_backs(idle) or [0.0]), both),
        Figure(
            "wake: rate of the copy",
            "GB/s",
            None if copy is None else copy / 1e9,
            limit=None if bare is None else bare / 1e9,
            bar=">= 95 % of the bare pinned copy",
            meets=None if copy is None or bare is None else bench.judge(copy >= 0.95 * bare),
        ),
        Figure(
            "wake: rate from released to usable",
            "GB/s",
            whole / 1e9,
            {name: nbytes / seconds / 1e9 for name, seconds in ons.items() if seconds},
            limit=None if bare is None else bare / 1e9,
            bar=">= 85 % of the bare pinned copy",
            meets=None if bare is None else bench.judge(whole >= 0.85 * bare),
        ),
        Figure("request with an image, vision resident: time to the first token", "s", median(resident)),
        Figure(
            "the same on demand: extra wait",
            "s",
            max(0.0, median(b - a for a, b in zip(resident, on_demand, strict=True))),
            bar="<= 5 ms",
            meets=bench.judge(median(b - a for a, b in zip(resident, on_demand, strict=True)) <= 0.005),
        ),
        Figure(f"tensors that differ after {cycles:,} cycles", "", len(same) - sum(same), bar="0", meets=all(same)),
        Figure("device bytes lost", "B", lost_device, bar="0", meets=bench.judge(lost_device <= 0)),
        Figure(
            "host bytes lost (resident memory)",
            "B",
            lost_host,
            bar="<= 16 MiB",
            meets=bench.judge(lost_host <= 16 << 20),
        ),
    ]
    size = f"{nbytes / 1e9:.3f} GB in {len(_tensors(wb))} tensors"
    return bench.report(
        "swap",
        figures,
        f"Between a park and a wake lie {1000 * _REST:g} ms: the driver clears what was released, and a copy beside "
        "that is slower.",
        f"The module is {_MODULE}, {size}. Peers move a plain module with the same tensors and return when it is done.",
        *notes,
    )


def _park_and_wake(wb: Workbench) -> None:
    """Once, to the end."""
    wb.modules[_MODULE].park().result()
    wb.modules[_MODULE].wake().result()


def _waits(when: str, parked: list[Parked], offs: dict[str, float | None], bench: Bench) -> Iterator[Figure]:
    waited, backs = [one.waited for one in parked], _backs(parked)
    yield Figure(f"park {when}: the caller waits, median", "s", median(waited), offs)
    longest = max(waited)
    on_gpu = bench.judge(longest < 0.001) if bench.cuda else None
    yield Figure(f"park {when}: the caller waits, longest of {len(parked)}", "s", longest, bar="< 1 ms", meets=on_gpu)
    back = max(backs) if len(backs) == len(parked) else None
    yield Figure(
        f"park {when}: the driver shows the bytes back, longest",
        "s",
        back,
        bar="<= 10 ms",
        meets=bench.judge(back is not None and back <= 0.01) if bench.cuda else None,
    )


def _backs(parked: list[Parked]) -> list[float]:
    return [one.back for one in parked if one.back is not None]


def _park(bench: Bench, wb: Workbench) -> Parked:
    """Park once, and wake again."""
    held = _held(bench)
    before, size = held(), wb.modules[_MODULE].info.nbytes
    time.sleep(0.02)
    start = time.perf_counter()
    move = wb.modules[_MODULE].park()
    waited = time.perf_counter() - start
    back = None
    while back is None and time.perf_counter() - start < _PATIENCE:
        if before - held() >= 0.99 * size:
            back = time.perf_counter() - start
        else:
            time.sleep(0.0001)
        if not bench.cuda:  # small modules lie within what the kernel counts roughly
            break
    move.result()
    wb.modules[_MODULE].wake().result()
    return Parked(waited, back)


def _held(bench: Bench) -> Callable[[], int]:
    """Bytes in use on the device as the driver says now."""
    if not bench.cuda:
        process = psutil.Process()
        return lambda: int(process.memory_info().rss)
    device, _ = NvmlDevice.open(visible_device(bench.device.index or 0))
    if device is None:
        return lambda: int(torch.cuda.mem_get_info(bench.device)[1] - torch.cuda.mem_get_info(bench.device)[0])
    return lambda: device.memory()[2]


def _wakes(bench: Bench, wb: Workbench, times: int) -> tuple[list[float], list[float]]:
    """Seconds from asking to the last byte, and of the copy alone."""
    wakes, copies = [], []
    for _ in range(times):
        wb.modules[_MODULE].park().result()
        time.sleep(_REST)
        wakes.append(bench.timed(wb.modules[_MODULE].wake))
        wb.engine.state.residency.settle()
        copies.append(wb.engine.state.residency.mover.copied)
    return wakes, copies


def _bare(bench: Bench, wb: Workbench) -> float:
    """Bytes a second of one copy from the same pinned buffer to the GPU, nothing else going on."""
    host = wb.engine.state.residency[_MODULE].backing.host
    assert host is not None
    source = host.alias()
    target = torch.empty(host.size, dtype=torch.uint8, device=bench.device)
    seconds = []
    for _ in range(10):
        begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        target.copy_(source, non_blocking=True)
        done.record()
        done.synchronize()
        seconds.append(begun.elapsed_time(done) / 1000)
    del target
    torch.cuda.empty_cache()
    return float(host.size / median(seconds))


@contextmanager
def _decoding(wb: Workbench, tokens: int) -> Iterator[None]:
    """A long answer is under way."""
    turn = wb.chat("Say something long", conversation="decoding", max_new_tokens=tokens)
    while len(turn.text) < _BEGUN and not turn.done:  # the first step may be captured, which nothing interrupts
        time.sleep(0.005)
    try:
        yield
        if turn.done:
            raise LabError("the answer ended before the parks were measured")
    finally:
        turn.cancel()
        turn.result(60)
        wb.drop("decoding")


def _requests(bench: Bench, wb: Workbench, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds to the first token of requests with a new image each: vision resident, and away."""
    before = wb.policy
    wb.policy = before.replace(
        modules={_MODULE: {"residency": "on-demand", "keep_alive": 3600.0}},
        generation={"max_new_tokens": 1},
    )
    size = (224, 224) if bench.small else (1080, 2400)
    resident: list[float] = []
    away: list[float] = []
    for number in range(2 * pairs + 2):
        times = (resident, away)[number % 2]
        if times is away:
            wb.modules[_MODULE].park().result()
        else:
            wb.modules[_MODULE].wake().result()
        image = screen(number, *size)
        answer = wb.chat("What is this?", image=image, conversation="swap").result(120)
        wb.drop("swap")
        assert answer.timings.first_token is not None
        times.append(answer.timings.first_token)
    wb.policy = before
    wb.modules[_MODULE].wake().result()
    return resident[1:], away[1:]


def _cycles(bench: Bench, wb: Workbench, times: int) -> tuple[list[bool], float, float]:
    """Whether each tensor is the same bit for bit afterwards, and the bytes that went missing."""
    state, process = wb.engine.state, psutil.Process()
    kept = {name: _bits(one).clone() for name, one in _tensors(wb).items()}
    wb.modules[_MODULE].park()
    wb.modules[_MODULE].wake().result()
    bench.synchronize()
    device, host = state.accelerator.reading().process, process.memory_info().rss
    for _ in range(times):
        wb.modules[_MODULE].park()
        wb.modules[_MODULE].wake()
    state.residency.settle()
    bench.synchronize()
    after = state.accelerator.reading().process
    lost_device = 0 if device is None or after is None else after - device
    lost_host = process.memory_info().rss - host
    same = [torch.equal(_bits(one), kept[name]) for name, one in _tensors(wb).items()]
    return same, lost_device, lost_host


def _tensors(wb: Workbench) -> dict[str, Tensor]:
    spec = next(spec for spec in wb.engine.state.residency.specs if spec.name == _MODULE)
    state = dict(wb.model.named_parameters()) | dict(wb.model.named_buffers())
    return {name: state[name] for name in spec.tensors if name in state}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
