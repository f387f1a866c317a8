"""The ledger against what the driver counts: what no owner answers for, what a variable hides, what looking costs.

Its peer is what one can know without owners: the process's bytes less what torch's allocator holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.prompts import prompt_of, screen
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.workbench import Workbench

_OPEN = 0.5
_COST = 0.5
_HIDDEN = 500_000_000
_NEAR = 4 << 20


def run(bench: Bench) -> Report:
    """What has no owner after loading, moves, turns; a hidden tensor; the time of a reading; the cost of sampling."""
    wb = bench.workbench
    wb.policy = wb.policy.replace(reclaim={"every_answers": None, "cached_share": None}, generation={"eos": False})
    figures = [*_closing(bench, wb), _hidden(bench, wb), *_reading(bench, wb)]
    cost, notes = _sampling(bench, wb)
    return bench.report(
        "ledger",
        [*figures, cost],
        "Unattributed: the process's bytes as the driver reports them less every row of the ledger; no other row is a "
        "difference. On a CPU it holds whatever Python took since the start, so it is not judged there.",
        "Without owners: the process's bytes less what torch's allocator holds, and less the weights and pages outside "
        "of it. That is what stays unexplained when one only asks torch.",
        *notes,
    )


def _closing(bench: Bench, wb: Workbench) -> list[Figure]:
    """What stays unattributed at each stage of a session."""
    short, long = (32, 128) if bench.small else (256, 4096)

    def move() -> None:
        for name in ("vision", "audio"):
            if name in wb.modules:
                wb.modules[name].park().result()
                wb.modules[name].wake().result()

    def ask(tokens: int, image: bool = False) -> Callable[[], object]:
        picture = screen(seed=tokens, width=1080 // (1 + bench.small), height=2400 // (1 + bench.small))
        text = prompt_of(wb, tokens, seed=tokens)
        return lambda: wb.chat(
            text, image=picture if image else None, conversation=f"ledger {tokens}", max_new_tokens=16
        ).result(600)

    def batch() -> None:
        texts = [prompt_of(wb, short, seed=seed) for seed in range(4)]
        turns = [wb.chat(text, conversation=f"ledger {n}", max_new_tokens=32) for n, text in enumerate(texts)]
        for turn in turns:
            turn.result(600)

    stages: list[tuple[str, Callable[[], object]]] = [
        ("after loading", lambda: None),
        ("after a park and a wake", move),
        (f"after a turn of {short:,} tokens", ask(short)),
        (f"after a turn of {long:,} tokens", ask(long)),
        *([("after a turn with an image", ask(short + 1, image=True))] if "vision" in wb.modules else []),
        ("after four turns in one batch", batch),
        ("after a park and a wake in between", move),
    ]
    figures = []
    for name, stage in stages:
        bench.say(name)
        stage()
        bench.synchronize()
        figures += _unattributed(bench, wb, name)
    for info in wb.conversations:
        wb.drop(info.name)
    wb.reclaim()
    return [*figures, *_unattributed(bench, wb, "after all is forgotten and reclaimed")]


def _unattributed(bench: Bench, wb: Workbench, when: str) -> list[Figure]:
    ledger, accelerator = wb.memory, wb.engine.state.accelerator
    counters = accelerator.counters()
    if ledger.process is None:
        return [Figure(f"{when}: unattributed", "B", None)]
    share = 100 * ledger.unattributed / ledger.process
    alone = ledger.process - counters.reserved - counters.slabs
    return [
        Figure(f"{when}: unattributed", "B", ledger.unattributed, {"without owners": alone} if bench.cuda else {}),
        Figure(
            f"{when}: of the process's {ledger.process / 2**30:.2f} GiB",
            "%",
            share,
            {"without owners": 100 * alone / ledger.process} if bench.cuda else {},
            bar=f"<= {_OPEN} %" if bench.cuda else "",
            meets=bench.judge(abs(share) <= _OPEN) if bench.cuda else None,
        ),
    ]


def _hidden(bench: Bench, wb: Workbench) -> Figure:
    """500 MB in a variable that no owner knows."""
    bench.say("hiding 500 MB")
    before = wb.memory.unattributed
    mine = torch.ones(_HIDDEN, dtype=torch.uint8, device=bench.device)
    bench.synchronize()
    found = wb.memory.unattributed - before
    del mine
    return Figure(
        "500 MB hidden in a variable: found as unattributed",
        "B",
        found,
        limit=_HIDDEN,
        bar="within 4 MiB" if bench.cuda else "",
        meets=abs(found - _HIDDEN) <= _NEAR if bench.cuda else None,
    )


def _reading(bench: Bench, wb: Workbench) -> list[Figure]:
    """How long one reading takes, with eight conversations held, beside other ways to look."""
    tokens = 64 if bench.small else 4096
    for number in range(8):
        text = prompt_of(wb, tokens, seed=number)
        wb.chat(text, conversation=f"ledger {number}", max_new_tokens=1).result(600)
    bench.say("timing a reading")
    wb.sampler.stop()
    ours = _median_seconds(lambda: wb.memory)
    rows = len(wb.memory.on("device"))
    peers: dict[str, float | None] = {}
    if bench.cuda:
        peers["torch's memory_snapshot()"] = _median_seconds(torch.cuda.memory_snapshot, times=20)
    wb.sampler.start()
    for info in wb.conversations:
        wb.drop(info.name)
    return [Figure(f"one reading, 8 conversations of {tokens:,} tokens, {rows} rows", "s", ours, peers)]


def _sampling(bench: Bench, wb: Workbench) -> tuple[Figure, list[str]]:
    """Decoding speed lost to sampling at 10 Hz: pairs of answers, one with and one without, in alternating order."""
    pairs, tokens = (4, 16) if bench.small else (24, 192)
    text = prompt_of(wb, 32 if bench.small else 512, seed=0)

    def speed(*, sampled: bool) -> float:
        if sampled:
            wb.sampler.start()
        else:
            wb.sampler.stop()
        answer = wb.chat(text, conversation="ledger", max_new_tokens=tokens).result(600)
        wb.drop("ledger")
        assert answer.timings.tokens_per_second is not None
        return answer.timings.tokens_per_second

    for _ in range(2):
        speed(sampled=True)
    bench.say(f"sampling on and off, {pairs} pairs")
    ratios = []
    for pair in range(pairs):
        first = bool(pair % 2)
        speeds = {sampled: speed(sampled=sampled) for sampled in (first, not first)}
        ratios.append(speeds[True] / speeds[False])
    wb.sampler.start()
    lost = [100 * (1 - ratio) for ratio in ratios]
    low, high = interval(lost)
    figure = Figure(
        f"decoding speed lost to sampling at {wb.sampler.hz:g} Hz: median of {pairs} pairs",
        "%",
        median(lost),
        bar=f"<= {_COST} %",
        meets=bench.judge(median(lost) <= _COST),
    )
    note = f"95 % interval of that median, by bootstrap: {low:.2f} to {high:.2f} %; below zero: faster with sampling."
    return figure, [note]


def interval(values: Sequence[float], times: int = 4000) -> tuple[float, float]:
    """The 95 % interval of the median of ``values``, by drawing them anew ``times`` times."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), size=(times, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def _median_seconds(look: Callable[[], object], times: int = 200) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        look()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
