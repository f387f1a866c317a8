"""One step of a phone agent under budgets: what is chosen automatically, and what plain transformers does there.

Every row has a process of its own under a hard cap on all that it takes, its context included.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from autoglm_lab.bench.bench import Bench, card_or_device
from autoglm_lab.bench.fresh import fresh
from autoglm_lab.bench.plan_worker import Watcher
from autoglm_lab.bench.prompts import said, screen, text_for, user
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.bench.stock import batch_of
from autoglm_lab.engine.policy_difference import difference
from autoglm_lab.errors import LabError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.image_tokens import limit_image_tokens
from autoglm_lab.models.loading import resolve
from autoglm_lab.opening import load, plan
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB, MiB, format_bytes

_BUDGETS = (24 * GiB, 16 * GiB, 12 * GiB, 8 * GiB)
_SMALL_BUDGETS = (8 * GiB, 64 * MiB)
IMAGE_TOKENS = 1275
"""Most tokens of an image at which a screen of 1080 x 2400 takes 1,219 of the phone model."""
_SYSTEM, _TASK, _PROMPT, _ANSWER = 2000, 30, 3300, 128
_SMALL_SYSTEM, _SMALL_PROMPT = 60, 400
_HERE = "autoglm_lab.bench.budgets"
_PATIENCE = 420
_STOCK = "transformers"

_STEP = (
    "One step: a system prompt of 2,000 tokens, a screenshot of 1080 x 2400 (1,219 tokens of the phone model), 128 new "
    "tokens, greedy; a step with other words and another screen comes before it."
)
_PEAK = (
    "The peak is what the process held at most, its context included, sampled every 3 ms. Tokens a second: from the "
    "first token to the last."
)
_CAP = "transformers: the plain model on the GPU under the same cap, less its context, on torch's allocator."
_NOTES = (_STEP, _PEAK, _CAP)


def run(bench: Bench) -> Report:
    """The same step under each budget: exact, with rounded weights where exact ones do not all stay on the device, and
    in plain transformers.
    """
    figures: list[Figure] = []
    notes = list(_NOTES)
    for budget in _SMALL_BUDGETS if bench.small else _BUDGETS:
        size = format_bytes(budget)
        if not bench.wants(size):
            continue
        bench.say(f"transformers under {size}")
        theirs = fresh(f"{_HERE}:stock", _PATIENCE, budget=budget, small=bench.small)
        bench.keep({"row": f"{size}, {_STOCK}", **theirs})
        notes.append(f"{size}, {_STOCK}: {theirs.get('error', 'it runs.')}")
        for quantize in dict.fromkeys((None, _rounding(bench, budget))):
            name = f"{size}, {'exact' if quantize is None else f'weights in {quantize}'}"
            bench.say(name)
            ours = fresh(f"{_HERE}:ours", _PATIENCE, budget=budget, quantize=quantize, small=bench.small)
            bench.keep({"row": name, **ours})
            figures += _figures(bench, name, budget, ours, theirs)
            notes.append(f"{name}: {ours.get('why', ours.get('error', ''))}")
    return bench.report("a phone agent's step under budgets", figures, *notes)


def _figures(bench: Bench, name: str, budget: int, ours: dict[str, Any], theirs: dict[str, Any]) -> list[Figure]:
    fits = "error" not in ours and ours["peak"] <= budget
    settings = f" ({ours['settings']})" if ours.get("settings") else ""
    bar = f"<= {format_bytes(budget)}"
    peak = Figure(
        f"{name}{settings}: peak of the process", "B", ours.get("peak"), {_STOCK: theirs.get("peak")}, budget, bar,
        bench.judge(fits),
    )  # fmt: skip
    return [
        peak,
        Figure(f"{name}: time to the first token", "s", ours.get("first"), {_STOCK: theirs.get("first")}),
        Figure(f"{name}: decoding", "tokens/s", ours.get("rate"), {_STOCK: theirs.get("rate")}),
    ]


def _rounding(bench: Bench, budget: int) -> str | None:
    """The most bits of the weights with which no layer has to stay on the host; None: none has to, or none would do."""
    device = card_or_device(bench.device)
    work, model = workload(small=bench.small), _model(small=bench.small)
    for quantize in (None, "int8", "int4"):
        found = plan(
            model,
            "auto",
            budget=budget,
            device=device,
            context=work.context,
            new_tokens=work.new_tokens,
            images=work.images,
            image_size=work.image_size,
            quantize=quantize,
        )
        if found.fits and not found.policy.placement.host_bytes:
            return quantize
    return None


def _model(*, small: bool) -> str:
    return "autoglm-tiny" if small else "autoglm-phone-9b"


def workload(*, small: bool) -> Workload:
    """The step as a plan takes it: a screen of this size takes as many tokens as a real one under `IMAGE_TOKENS`."""
    return Workload(_SMALL_PROMPT if small else _PROMPT, _tokens(small=small), images=1, image_size=(644, 1484))


def ours(budget: int, quantize: str | None, small: bool) -> dict[str, Any]:
    """Measure what is chosen for the budget, in this process."""
    try:
        return _step(budget, quantize, small=small)
    except LabError as error:
        return {"error": f"{type(error).__name__}: {error}".replace("\n", " ")}


def _step(budget: int, quantize: str | None, *, small: bool) -> dict[str, Any]:
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    watcher = Watcher(open_accelerator(device))
    work, weights = workload(small=small), None if small else "dummy"
    asked = {"policy": "auto", "budget": budget, "workload": work, "quantize": quantize}
    with load(_model(small=small), weights=weights, device=device, progress=False, **asked) as wb:  # type: ignore[arg-type]
        chosen = wb.policy
        wb.policy = chosen.replace(
            max_image_tokens=None if small else IMAGE_TOKENS,
            generation={"eos": False, "max_new_tokens": work.new_tokens},
            reclaim={"every_answers": None, "cached_share": None},
        )
        answers = []
        for seed in range(2):
            messages = _messages(wb.processor, seed, small=small)
            answers.append(wb.engine.submit(messages, conversation="step", replace=True).result(_PATIENCE))
            wb.drop("step")
        why = next(event.why for event in wb.sampler.events() if event.subject == "chosen")
    watcher.stop()
    last = answers[-1]
    return {
        "peak": max([watcher.process, *(nbytes for one in answers for nbytes in one.peak_bytes.values())]),
        "first": last.timings.first_token,
        "rate": last.timings.tokens_per_second,
        "prompt": last.usage.prompt_tokens,
        "image": last.usage.image_tokens,
        "settings": _told(difference(MemoryPolicy(budget=budget), chosen)),
        "policy": chosen.to_dict(),
        "why": why,
    }


def stock(budget: int, small: bool) -> dict[str, Any]:
    """Measure plain transformers under the same cap, in this process; a CPU has no such cap."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    accelerator = open_accelerator(device)
    watcher = Watcher(accelerator)
    doing = "loading"
    try:
        if device.type == "cuda":
            share = (budget - accelerator.context) / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(share, device)
        found = resolve(_model(small=small), weights=None if small else "dummy", device=device)
        model: Any = _filled(found.model, device)
        limit_image_tokens(found.processor, None if small else IMAGE_TOKENS)
        doing = "answering"
        seconds = []
        for seed, count in ((0, 2), (1, 1), (1, _tokens(small=small))):
            batch = batch_of(found.processor, model, _messages(found.processor, seed, small=small))
            start = time.perf_counter()
            model.generate(**batch, do_sample=False, min_new_tokens=count, max_new_tokens=count)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError as error:
        watcher.stop()
        return {"error": f"{type(error).__name__} while {doing}: {str(error).splitlines()[0][:160]}"}
    watcher.stop()
    _, first, whole = seconds
    return {"peak": watcher.process, "first": first, "rate": (count - 1) / max(1e-9, whole - first)}


def _filled(model: Any, device: torch.device) -> Any:
    """The model with made-up parameters on the device; buffers are what they were."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                values = torch.full(parameter.shape, 0.001, dtype=parameter.dtype, device=device)
                made[id(parameter)] = nn.Parameter(values, requires_grad=False)
            setattr(module, name, made[id(parameter)])
    return model.to(device).eval()


def _messages(processor: Any, seed: int, *, small: bool) -> list[dict[str, Any]]:
    system = text_for(processor, _SMALL_SYSTEM if small else _SYSTEM, seed=seed)
    return [said("system", system), user(text_for(processor, _TASK, seed=seed + 10), screen(seed))]


def _tokens(*, small: bool) -> int:
    return 8 if small else _ANSWER


def _told(settings: dict[str, Any], *above: str) -> str:
    """Settings as a person writes them."""
    parts = []
    for name, value in settings.items():
        if isinstance(value, dict):
            parts.append(_told(value, *above, name))
        else:
            size = name.endswith("bytes") and isinstance(value, int)
            parts.append(f"{'.'.join((*above, name))}={format_bytes(value) if size else value}")
    return ", ".join(parts)
