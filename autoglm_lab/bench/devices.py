"""One model on two GPUs: how evenly it lies on them, what the second one costs, and that it answers as on one.

Every row has a process of its own. Beside ours stands accelerate's ``device_map="balanced"`` on the same shapes.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.fresh import fresh
from autoglm_lab.bench.prompts import screen, seen
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.bench.stock import batch_of
from autoglm_lab.errors import LabError
from autoglm_lab.memory.high_water import high_water
from autoglm_lab.models.loading import outline, resolve
from autoglm_lab.models.spread import balanced
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.workbench import Workbench

_HERE = "autoglm_lab.bench.devices"
_ANSWER = 33
_EVEN = 5.0
_SCREEN = (644, 1484)
"""A screen of this size takes 1,219 tokens of the phone model."""


def run(bench: Bench) -> Report:
    """Bytes of each device after the load and at the peak of one turn; tokens a second; the same text."""
    if not bench.small and torch.cuda.device_count() < 2:
        raise LabError(f"this bench needs two GPUs, and torch sees {torch.cuda.device_count()} here")
    prompt = 256 if bench.small else 8192
    bench.say("one device")
    one = fresh(f"{_HERE}:ours", cards=1, prompt=prompt, small=bench.small)
    bench.say("two devices")
    two = fresh(f"{_HERE}:ours", cards=2, prompt=prompt, small=bench.small)
    theirs: dict[str, Any] = {}
    if not bench.small:
        bench.say("accelerate on two devices")
        theirs = fresh(f"{_HERE}:accelerated", prompt=prompt)
    for name, row in (("one device", one), ("two devices", two)):
        if "error" in row:
            raise LabError(f"{name}: {row['error']}")
    return bench.report(
        "two devices",
        _figures(bench, one, two, theirs),
        f"One turn: a prompt of {prompt:,} tokens, a screenshot among them, and {_ANSWER} new ones.",
        "What a device holds is the process's bytes as the driver counts them, at the peak with the allocator's "
        "reserved bytes at theirs.",
        "Limit of the sum: one device's peak, and for the second its context, its workspaces, what the driver took "
        "there, and activations as high as the first one's.",
        "accelerate: device_map='balanced' through dispatch_model, transformers' generate.",
        *([f"accelerate: {theirs['error']}"] if "error" in theirs else []),
        *(["Both devices are this machine's memory here: the figures show that the code runs."] if bench.small else []),
    )


def _figures(bench: Bench, one: dict[str, Any], two: dict[str, Any], theirs: dict[str, Any]) -> list[Figure]:
    figures = []
    for when in ("loaded", "peak"):
        uneven = 100 * (1 - min(two[when]) / max(two[when]))
        other = theirs.get(when)
        peers = {"accelerate": 100 * (1 - min(other) / max(other)) if other else None}
        meets = bench.judge(uneven <= _EVEN)
        what = {"loaded": "after the load", "peak": "at the turn's peak"}[when]
        figures.append(Figure(f"apart {what}", "%", uneven, peers, bar=f"<= {_EVEN:g} %", meets=meets))
        for card, nbytes in enumerate(two[when]):
            beside = {"accelerate": other[card] if other else None}
            figures.append(Figure(f"device {card} {what}", "B", nbytes, beside))
    whole = sum(two["peak"])
    limit = one["peak"][0] + one["work"] + two["second"]
    figures.append(
        Figure("both together", "B", whole, {"accelerate": sum(theirs["peak"]) if "peak" in theirs else None},
               limit=limit, bar="<= the limit", meets=bench.judge(whole <= limit))
    )  # fmt: skip
    same = float(one["text"] == two["text"])
    figures.append(Figure("the text of one device", "", same, bar="1: the same", meets=bool(same)))
    for what, unit in (("rate", "tokens/s"), ("first", "s")):
        name = {"rate": "decode", "first": "time to the first token"}[what]
        beside = {"one device": one[what], "accelerate": theirs.get(what)}
        figures.append(Figure(name, unit, two[what], beside))
    return figures


def ours(cards: int, prompt: int, small: bool) -> dict[str, Any]:
    """Measure ours on so many devices, in this process."""
    policy = MemoryPolicy(
        kv={"prefix_bytes": 0, "prefix_host_bytes": 0, "encoder_bytes": 0},
        generation={"eos": False, "max_new_tokens": _ANSWER},
        reclaim={"every_answers": None, "cached_share": None},
    )
    with _opened(cards, policy, small) as wb:
        state = wb.engine.state
        state.reclaim("a fair start")
        loaded = [_process(accelerator) for accelerator in state.accelerators]
        for kept in (False, True):  # the first turn loads kernels
            watches = [(one, high_water(one.device).open()) for one in state.accelerators] if kept else []
            answer = wb.engine.submit([_asked(wb.processor, prompt, small=small)], conversation="turn").result(600)
            peaks = [high_water(one.device).close(watch, _process(one)) for one, watch in watches]
            wb.drop("turn")
        second = 0
        for other in state.accelerators[1:]:
            second += other.context + max(0, other.grown.nbytes)
            second += sum(row.nbytes or 0 for row in other.holdings() if row.name == "workspaces")
    return {
        "loaded": loaded,
        "peak": [peak.process for peak in peaks],
        "work": peaks[0].work,
        "second": second,
        "text": answer.text,
        "rate": answer.timings.tokens_per_second,
        "first": answer.timings.first_token,
    }


def _opened(cards: int, policy: MemoryPolicy, small: bool) -> Workbench:
    from autoglm_lab.memory.accelerator import open_accelerator
    from autoglm_lab.opening import load

    name, weights = ("autoglm-tiny", None) if small else ("autoglm-phone-9b", "dummy")
    if cards == 1 or torch.cuda.device_count() >= cards:
        return load(name, weights=weights, policy=policy, devices=cards if cards > 1 else None)
    accelerators = [open_accelerator("cpu") for _ in range(cards)]  # both are this machine's memory
    resolved = resolve(name, weights=weights, device=accelerators[0].device)
    spread = balanced(resolved.model, [accelerator.device for accelerator in accelerators])
    return Workbench(resolved, policy, *accelerators, spread=spread)


def _asked(processor: Any, prompt: int, *, small: bool) -> dict[str, Any]:
    """What balances the load: keys and values, and an encoder at work."""
    return seen(processor, prompt, screen(3) if small else screen(3, *_SCREEN), seed=3)


def _process(accelerator: Any) -> int:
    reading = accelerator.reading()
    return int(reading.used if reading.process is None else reading.process)


def accelerated(prompt: int) -> dict[str, Any]:
    """Measure accelerate on two devices, in this process."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    from autoglm_lab.memory.accelerator import open_accelerator

    accelerators = [open_accelerator(f"cuda:{index}") for index in range(2)]
    shapes = outline("autoglm-phone-9b", device="cuda")
    model: Any = shapes.model
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.001)
    model.generation_config.eos_token_id = None
    split = list(model._no_split_modules or ())  # noqa: SLF001 - as transformers gives it to accelerate
    most = get_balanced_memory(model, no_split_module_classes=split)
    dispatch_model(model, infer_auto_device_map(model, max_memory=most, no_split_module_classes=split))
    loaded = [_process(accelerator) for accelerator in accelerators]
    processor = shapes.processor()
    batch = batch_of(processor, model, [_asked(processor, prompt, small=False)])
    seconds = []
    for count in (1, 1, _ANSWER):
        watches = [(one, high_water(one.device).open()) for one in accelerators]
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(**batch, do_sample=False, min_new_tokens=count, max_new_tokens=count)
        torch.cuda.synchronize(0)
        seconds.append(time.perf_counter() - start)
        peaks = [high_water(one.device).close(watch, _process(one)).process for one, watch in watches]
    return {
        "loaded": loaded,
        "peak": peaks,
        "rate": (_ANSWER - 1) / max(1e-9, seconds[2] - seconds[1]),
        "first": seconds[1],
    }
