"""Random requests under a budget, or for some minutes: nothing crashes, nothing is wrong, nothing stays."""

from __future__ import annotations

import time
from collections.abc import Sequence

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.prompts import screen, text_of, user
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.bench.traffic import IN_FLIGHT, Case, Scale, Traffic
from autoglm_lab.errors import LabError
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.units import GiB, MiB
from autoglm_lab.workbench import Workbench

_REQUESTS = 300
_SECONDS = 170.0
_SEED = 2026
_JUDGED_MINUTES = 10.0
_NOT_OURS = ("context", "driver reserved", "other processes", "unattributed", "free", "allocator cache")


def run(bench: Bench) -> Report:
    """The requests, then everything dropped: what is left is compared with what stood after the warm-up."""
    wb = bench.workbench
    scale = Scale(200, 448, 8, sample=0.4) if bench.small else Scale(16_000, 2400, 32, sample=0.1)
    # The embedded model's stores are to be full early, so that what still grows is not theirs.
    stores = {"prefix_bytes": 16 * MiB, "encoder_bytes": 2 * MiB} if bench.small else {}
    wb.policy = wb.policy.replace(
        budget=None if bench.small else 24 * GiB,
        kv={"max_tokens": 1024 if bench.small else 20_000, "overflow": "drop-oldest-turns", **stores},
        generation={"eos": False},
    )
    bench.say("warm-up")
    _warm_up(wb, scale)
    if bench.minutes is not None:
        fill_ring(wb)
    before = at_rest(wb)
    traffic = Traffic(wb, scale, _SEED)
    seconds, requests = _extent(bench)
    samples: list[tuple[float, int]] = []
    started, done = time.monotonic(), 0
    while time.monotonic() - started < seconds and (requests is None or done < requests):
        traffic.request()
        done += 1
        process = wb.memory.process
        if process is not None:
            samples.append((time.monotonic() - started, process))
        if done % 50 == 0:
            bench.say(f"{done} requests")
    lasted = time.monotonic() - started
    traffic.land()
    bench.say(f"{len(traffic.cases)} answers once more, alone")
    shared = _again(wb, traffic.cases)
    after = at_rest(wb)
    wb.policy = wb.policy.replace(budget=None)
    crashed = len(traffic.crashes)
    figures = [
        Figure(
            "requests done",
            "",
            done,
            limit=requests,
            bar="all" if requests is not None else "",
            meets=None if requests is None else bench.judge(done == requests),
        ),
        Figure("errors that are not the package's own", "", crashed, bar="none", meets=crashed == 0),
        _equality(wb, shared),
        *_rest(bench, before, after),
    ]
    if not bench.cuda:
        figures.append(_growth(bench, [sample for sample in samples if sample[0] >= lasted / 2]))
    counts = ", ".join(f"{count} {what}" for what, count in sorted(traffic.outcomes.items()))
    return bench.report(
        "soak",
        figures,
        f"{done} requests in {lasted:.0f} s: {counts}.",
        "At random, seeded: texts, images, long prompts, eight conversations of which up to four answer at once, "
        "modules parked, conversations forgotten, answers stopped in mid-stream.",
        "Bytes are compared with nothing kept and every module on the device.",
        *traffic.crashes[:5],
    )


def _extent(bench: Bench) -> tuple[float, int | None]:
    """How long the run may last, and how many requests it has; None: as many as fit."""
    if bench.minutes is not None:
        return bench.minutes * 60, None
    return (20.0, 25) if bench.small else (_SECONDS, _REQUESTS)


def _warm_up(wb: Workbench, scale: Scale) -> None:
    """Every kind of request, alone and four at once: kernels, captured steps and libraries are there afterwards."""
    for module in wb.modules:
        wb.modules[module].park().result()
    wb.chat("what is on it?", image=screen(0, scale.tallest * 9 // 20, scale.tallest), max_new_tokens=4).result(300)
    wb.chat(text_of(wb, scale.long, seed=1), max_new_tokens=4).result(300)
    for count in range(1, IN_FLIGHT + 1):
        names = [f"warm-up {number}" for number in range(count)]
        turns = [wb.engine.submit([user("hello")], conversation=name, max_new_tokens=32) for name in names]
        for turn in turns:
            turn.result(300)


def fill_ring(wb: Workbench) -> None:
    """As many samples as the workbench keeps, so that it is not their number that grows."""
    kept = -1
    while kept < (kept := len(wb.sampler.samples())):
        for _ in range(500):
            wb.sampler.sample()


def at_rest(wb: Workbench) -> Ledger:
    """The ledger with nothing kept: no conversation, empty stores, every module on the device."""
    policy = wb.policy
    for info in wb.conversations:
        wb.drop(info.name)
    wb.policy = policy.replace(kv={"prefix_bytes": 0, "prefix_host_bytes": 0, "encoder_bytes": 0})
    for module in wb.modules:
        wb.modules[module].wake().result()
    wb.reclaim()
    ledger = wb.memory
    wb.policy = policy
    return ledger


def _again(wb: Workbench, cases: Sequence[Case]) -> list[float]:
    """Each case alone in a new conversation, without reuse: the share of its text before the first difference."""
    before = wb.policy
    wb.policy = before.replace(kv={"reuse": False})
    shares = []
    for case in cases:
        turn = wb.engine.submit(case.messages, conversation="again", replace=True, max_new_tokens=case.tokens)
        try:
            answer = turn.result(300)
        except LabError:
            shares.append(0.0)
        else:
            shares.append(_shared(case.text, answer.reasoning + answer.text))
        wb.drop("again")
    wb.policy = before
    return shares


def _shared(one: str, other: str) -> float:
    if one == other:
        return 1.0
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other))) / max(len(one), len(other))


def _equality(wb: Workbench, shares: Sequence[float]) -> Figure:
    dtype = str(wb.model.dtype).removeprefix("torch.")
    equal, cases = sum(share == 1.0 for share in shares), len(shares)
    name = f"answers equal when asked alone, of {cases} ({dtype})"
    if dtype == "float32":
        return Figure(name, "", equal, limit=cases, bar="all", meets=equal == cases)
    mean = 100 * sum(shares) / max(1, cases)
    return Figure(f"{name}; {mean:.0f} % of the text comes before a difference", "", equal, limit=cases)


def _rest(bench: Bench, before: Ledger, after: Ledger) -> list[Figure]:
    differ = sorted({name for name, *_ in _owners(before) ^ _owners(after)})
    name = "owners whose bytes differ from those after the warm-up" + (f" ({', '.join(differ)})" if differ else "")
    figures = [Figure(name, "", len(differ), bar="none", meets=not differ)]
    if before.process is not None and after.process is not None:
        grown = after.process - before.process
        meets = bench.judge(abs(grown) <= 32 * MiB) if bench.cuda else None
        figures.append(
            Figure("process bytes over those after the warm-up", "B", grown, bar="within 32 MiB", meets=meets)
        )
    return figures


def _owners(ledger: Ledger) -> set[tuple[str, int]]:
    return {(row.name, row.nbytes) for row in ledger.on("device") if row.kind not in _NOT_OURS and row.nbytes}


def _growth(bench: Bench, samples: Sequence[tuple[float, int]]) -> Figure:
    slope = 60 * slope_of(samples) / 1e6
    judged = bench.minutes is not None and bench.minutes >= _JUDGED_MINUTES
    return Figure(
        "slope of anonymous memory over the second half",
        "MB/min",
        slope,
        bar="<= 1 MB a minute in 10 minutes",
        meets=slope <= 1.0 if judged else None,
    )


def slope_of(points: Sequence[tuple[float, int]]) -> float:
    """Bytes a second that fit ``(second, bytes)`` best, by least squares."""
    if len(points) < 2:
        return 0.0
    middle = sum(second for second, _ in points) / len(points)
    level = sum(nbytes for _, nbytes in points) / len(points)
    spread = sum((second - middle) ** 2 for second, _ in points)
    return sum((second - middle) * (nbytes - level) for second, nbytes in points) / spread if spread else 0.0
