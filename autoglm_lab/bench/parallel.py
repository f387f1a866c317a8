"""One model over several devices that compute every layer together, beside one device: bytes of each, and speed.

Every row has processes of its own. Ranks decode step by step, so one device stands beside them both ways: through
captured graphs, as it decodes otherwise, and step by step.
"""

from __future__ import annotations

from typing import Any

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.fresh import fresh
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.errors import LabError

_HERE = "autoglm_lab.bench.parallel:measured"
_TIMEOUT = 600.0


def run(bench: Bench) -> Report:
    """Tokens a second, seconds to the first token, and each device's bytes."""
    ranks, whole = bench.ranks, "one process"
    rows = {whole: {"ranks": 1, "graphs": True}, "step by step": {"ranks": 1, "graphs": False}}
    if not bench.cuda:
        del rows["step by step"]  # there are no graphs
    rows["ranks"] = {"ranks": ranks, "graphs": False}
    found: dict[str, dict[str, Any]] = {}
    for name, arguments in rows.items():
        bench.say(f"{ranks} ranks" if name == "ranks" else f"one process, {name}" if name != whole else name)
        found[name] = fresh(_HERE, _TIMEOUT, small=bench.small, **arguments)
        if "error" in found[name]:
            raise LabError(f"{name}: {found[name]['error']}")
    ours = found.pop("ranks")

    def beside(what: str) -> dict[str, float | None]:
        return {name: one[what] for name, one in found.items()}

    tokens = ours["prompt_tokens"]
    figures = [
        Figure(f"decoding on {ranks} ranks", "tokens/s", ours["rate"], beside("rate")),
        Figure(f"first token of a prompt of {tokens:,} tokens", "s", ours["first"], beside("first")),
    ]
    for rank, device in enumerate(ours["devices"]):
        peers = {name: one["devices"][0] for name, one in found.items()} if rank == 0 else {}
        for what, title in (
            ("weights", "weights"),
            ("kv", "keys and values"),
            ("process", "process, after the answer"),
        ):
            names = {name: one[what] for name, one in peers.items()}
            figures.append(Figure(f"rank {rank}: {title}", "B", device[what], names))
    if bench.small:
        same = ours["texts"] == found[whole]["texts"]
        figures.append(Figure("answers that are the same", "%", 100.0 * same, bar="= 100 %", meets=same))
    return bench.report(
        "tensor parallel",
        figures,
        f"{ours['answer_tokens']} tokens after a prompt of {tokens:,}, one conversation, greedy.",
        "The process's bytes are the driver's, context and NCCL's buffers included."
        if bench.cuda
        else "On a CPU all ranks share its cores and its memory: speed and the process's bytes say little.",
    )


def measured(ranks: int, graphs: bool, small: bool) -> dict[str, Any]:
    """Measure in this process, and those that it starts."""
    from autoglm_lab.bench.prompts import prompt_of
    from autoglm_lab.opening import load
    from autoglm_lab.policy import MemoryPolicy

    prompt_tokens, answer_tokens = (96, 24) if small else (4096, 128)
    policy = MemoryPolicy(kv={"graphs": graphs, "prefix_bytes": 0}, generation={"eos": False})
    name = "autoglm-tiny" if small else "autoglm-phone-9b"
    options: dict[str, Any] = {"dtype": "float32"} if small else {"weights": "dummy"}
    texts = []
    with load(name, policy=policy, tensor_parallel=ranks, **options) as wb:
        for seed in (0, 1):  # the first one loads kernels
            answer = wb.chat(prompt_of(wb, prompt_tokens, seed), conversation="one", max_new_tokens=answer_tokens)
            done = answer.result(_TIMEOUT)
            texts.append(done.text)
            ledgers = wb.ledgers()
            wb.drop("one")
    timings = done.timings
    return {
        "rate": timings.tokens_per_second,
        "first": timings.first_token,
        "prompt_tokens": done.usage.prompt_tokens,
        "answer_tokens": done.usage.completion_tokens,
        "texts": texts,
        "devices": [
            {"weights": one.of_kind("weights"), "kv": one.of_kind("kv"), "process": one.process} for one in ledgers
        ],
    }
