"""Fine-tuning adapters on weights kept in NF4 under a hard cap (QLoRA), in a process of its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.fresh import fresh
from autoglm_lab.bench.report import Figure
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.opening import load
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB

CAP = 12 * GiB


def figures(bench: Bench, tokens: int) -> tuple[list[Figure], str]:
    """Time and bytes of a step, and how it was done; where it failed, a figure without a value and why."""
    bench.say("adapters on weights in NF4, under 12 GiB")
    found = fresh(
        "autoglm_lab.bench.train_nf4:measure", 600.0, device=str(bench.device), small=bench.small, tokens=tokens
    )
    if "error" in found:
        failed = Figure("adapters on NF4: the process at most", "B", None, bar="<= 12 GiB", meets=bench.judge(False))
        return [failed], f"Adapters on NF4 under 12 GiB failed: {found['error']}"
    held = found["process"]
    return [
        Figure("adapters on NF4: a step", "s", found["seconds"]),
        Figure(
            "adapters on NF4: the process at most", "B", held, bar="<= 12 GiB",
            meets=None if held is None else bench.judge(held <= CAP),
        ),
        Figure("adapters on NF4: the process at most, as planned", "B", found["planned"]),
    ], (
        "Adapters on NF4: a process of its own whose budget is 12 GiB, one dialogue of as many tokens a step, its "
        f"answer learnt, {found['settings']}; seconds of the steps after the first, optimiser included."
    )  # fmt: skip


def measure(device: str, *, small: bool, tokens: int) -> dict[str, Any]:
    """Steps of one training under the cap; what the process held at most, as the driver reports it, and the plan."""
    name, weights = ("autoglm-tiny", None) if small else ("autoglm-phone-9b", "dummy")
    policy = MemoryPolicy(budget=CAP, training={"micro_batch": 1, "accumulation": 1})
    with load(name, weights=weights, device=device, quantize="nf4", policy=policy) as wb:
        tokenizer = getattr(wb.processor, "tokenizer", wb.processor)
        answer = ""
        while len(tokenizer(answer, add_special_tokens=False)["input_ids"]) < tokens - 40:
            answer += "".join(f"{number} " for number in range(8))
        data = [{"messages": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": answer}]}]
        seconds: list[float] = []
        plan = wb.plan(workload=Workload(training=TrainingLoad("lora", tokens, 16)), search=False)
        run = wb.finetune(data, rank=16, steps=3 if small else 6, watch=lambda run: seconds.append(run.seconds))
        result = run.result()
        after = [end - begin for begin, end in pairwise(seconds) if end > begin > 0]
        return {
            "seconds": sum(after) / len(after),
            "process": max(result.peaks.process.values(), default=None),
            "planned": plan["train"].needed,
            "settings": result.settings,
        }
