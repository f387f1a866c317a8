"""Decoding where the budget cannot hold the weights: parts of the layers come from the host for every token.

Every row has a process of its own under a hard cap. Beside it stands accelerate, which moves what ``max_memory`` does
not hold, and the bus: no one can be faster than it brings the layers and the head that the budget has no room for.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from autoglm_lab.bench.bench import Bench, card_or_device
from autoglm_lab.bench.fresh import fresh
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.memory.planning.device_constants import plan_device
from autoglm_lab.memory.planning.plan_search import host_bytes
from autoglm_lab.memory.planning.planner import planner
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.decoder_layers import decoder_layers
from autoglm_lab.models.loading import outline
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB, format_bytes

_SHARE = 0.85
_SPARE = 0.001
"""Share of a budget that the plan leaves free."""
_BESIDE = 1_250_000_000
"""Bytes of a budget that accelerate is not told of: context, kernels, workspaces, a step's tensors, keys and values."""
_PROMPT, _ANSWER = 256, 33
_CHUNKS = (256, 128, 64)
_HERE = "autoglm_lab.bench.layers"


def run(bench: Bench) -> Report:
    """Tokens a second under three budgets, and whole on the device."""
    figures = []
    for budget in (None,) if bench.small else (None, 16 * GiB, 10 * GiB, 6 * GiB):
        name = "no budget" if budget is None else format_bytes(budget)
        bench.say(f"ours, {name}")
        ours = fresh(f"{_HERE}:ours", budget=budget, small=bench.small)
        theirs: dict[str, Any] = {}
        if bench.cuda:
            bench.say(f"accelerate, {name}")
            theirs = fresh(f"{_HERE}:accelerated", budget=budget, small=bench.small)
        figures += _figures(name, budget, ours, theirs)
    return bench.report(
        "layers on the host",
        figures,
        f"Decoding {_ANSWER - 1} tokens after a prompt of {_PROMPT}, one conversation, vision parked. A budget is a "
        "hard cap on the whole process, its context included; what stays on the host is the least that the plan says, "
        "with the prompt in chunks of 256, 128 or 64 tokens.",
        "accelerate: device_map='auto' with a max_memory of the budget less 1.25 GB, through transformers' generate; "
        "its process may take more than that.",
        "Limit: the rate of a pinned copy in this run, by the bytes of layers and head that the budget has no room for "
        "beside what else the process holds; the embedding, of which a step reads one row, is not counted.",
    )


def _figures(name: str, budget: int | None, ours: dict[str, Any], theirs: dict[str, Any]) -> list[Figure]:
    if "error" in ours:
        return [Figure(f"{name}: {ours['error']}", "tokens/s", None, {"accelerate": theirs.get("rate")})]
    limit = None
    if budget is not None and ours["missing"] > 0:
        limit = ours["bus"] / ours["missing"]
    rate = ours["rate"]
    what = f"{name}: {format_bytes(ours['on_host'])} on the host, {format_bytes(ours['passing'])} pass a token"
    meets = None if limit is None else rate >= _SHARE * limit
    bar = "" if limit is None else f">= {_SHARE} x the bus"
    found = [Figure(what, "tokens/s", rate, {"accelerate": theirs.get("rate")}, limit=limit, bar=bar, meets=meets)]
    if ours["process"] is not None:
        inside = None if budget is None else ours["process"] <= budget
        bar = "" if budget is None else "<= the budget"
        peers = {"accelerate": theirs.get("process")}
        found.append(Figure(f"{name}: peak of the process", "B", ours["process"], peers, bar=bar, meets=inside))
    return found


def ours(budget: int | None, small: bool) -> dict[str, Any]:
    """Measure ours in this process."""
    from autoglm_lab.bench.prompts import prompt_of
    from autoglm_lab.opening import load

    name = "autoglm-tiny" if small else "autoglm-phone-9b"
    policy = MemoryPolicy(
        modules={"vision": "off"},
        budget=budget,
        kv={"prefix_bytes": 0},
        generation={"eos": False},
        reclaim={"every_answers": None, "cached_share": None},
    )
    if budget is not None:
        policy = _planned(name, policy)
    with load(name, weights=None if small else "dummy", policy=policy) as wb:
        prompt = prompt_of(wb, _PROMPT, seed=1)
        peaks = []
        for _ in range(2):  # the first one loads kernels and captures
            answer = wb.chat(prompt, conversation="layers", max_new_tokens=_ANSWER).result(600)
            wb.drop("layers")
            peaks += list(answer.peak_bytes.values())
        ledger = wb.memory
        held = ledger.of_kind("weights")
        on_host = wb.engine.state.residency.on_host
        process = ledger.process
    layers_and_head = _layers_and_head(name)
    beside = 0 if process is None else process - held
    return {
        "rate": answer.timings.tokens_per_second,
        "process": max(peaks, default=None),
        "on_host": 0 if on_host is None else on_host.nbytes,
        "passing": 0 if on_host is None else on_host.passing,
        "missing": 0 if budget is None else layers_and_head - (budget - beside),
        "bus": _bus() if torch.cuda.is_available() else None,
    }


def accelerated(budget: int | None, small: bool) -> dict[str, Any]:
    """Measure accelerate in this process."""
    from accelerate import dispatch_model, infer_auto_device_map

    from autoglm_lab.memory.cuda_machine import CudaMachine

    model: Any = outline("autoglm-tiny" if small else "autoglm-phone-9b", device="cuda").model
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.001)
    model.generation_config.eos_token_id = None
    machine = CudaMachine(torch.device("cuda:0"))
    most = {0: int(1e15) if budget is None else budget - _BESIDE, "cpu": int(1e15)}
    split = model._no_split_modules  # noqa: SLF001 - as transformers gives it to accelerate
    device_map = infer_auto_device_map(model, max_memory=most, no_split_module_classes=list(split or ()))
    dispatch_model(model, device_map)
    ids = torch.full((1, _PROMPT), 7, device="cuda:0")
    seconds = []
    for count in (1, 2 if budget is not None else _ANSWER):
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(input_ids=ids, do_sample=False, min_new_tokens=count, max_new_tokens=count)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    count = 1 if budget is not None else _ANSWER - 1
    rate = count / max(1e-9, seconds[1] - seconds[0])
    return {"rate": rate, "process": machine.process_bytes()}


def _planned(name: str, policy: MemoryPolicy) -> MemoryPolicy:
    """The chunk of a prompt and the bytes on the host with which least passes the bus for a token, as planned for the
    card by its name: a smaller chunk leaves more of the budget to weights.
    """
    where = plan_device(card_or_device(torch.device("cuda:0")), policy.budget, None)
    predict = planner(outline(name, device="cuda"), where)
    found = []
    for chunk in _CHUNKS:
        tried = policy.replace(kv={"chunk": chunk})
        asked = host_bytes(predict, tried, Workload(_PROMPT + _ANSWER, _ANSWER), spare=_SPARE) or 0
        found.append(tried.replace(placement={"host_bytes": asked}))
    return min(found, key=predict.passing)


def _layers_and_head(name: str) -> int:
    """Bytes of the layers with the head."""
    from autoglm_lab.models.anatomy import anatomy, named_tensors

    model = outline(name, device="cuda").model
    tensors = dict(named_tensors(model))
    layers = {id(one) for layer in decoder_layers(model) for _, one in named_tensors(layer)}
    return sum(
        tensors[one].nbytes
        for spec in anatomy(model)
        for one in spec.tensors
        if spec.name not in ("vision", "audio") and (spec.name == "head" or id(tensors[one]) in layers)
    )


def _bus() -> float:
    """Bytes a second of a large pinned copy to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    source = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda:0")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return source.nbytes / min(seconds)
