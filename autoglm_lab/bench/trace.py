"""A phone agent at work: each step sends a new screenshot, and the ones before are stripped from the history.

The agent's client keeps no state on the engine: it sends the whole dialogue at each step. Ours keeps what begins alike;
plain transformers reads it all anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.prompts import said, screen, text_of, user
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.bench.stock import Stock
from autoglm_lab.engine.protocol import Answer
from autoglm_lab.workbench import Workbench

_PIXELS = 2_000_000
"""Longest edge, in the image processor's sense, at which a screen of 1080 x 2400 takes 1219 tokens."""


def run(bench: Bench) -> Report:
    """20 steps of a phone agent, ours and plain transformers on the same dialogue."""
    wb = bench.workbench
    steps, system, task, answer = (4, 200, 10, 8) if bench.small else (20, 2000, 30, 60)
    wb.policy = wb.policy.replace(
        reclaim={"every_answers": None, "cached_share": None}, generation={"max_new_tokens": answer, "eos": False}
    )
    with _image_size(wb, _PIXELS):
        dialogue = [said("system", text_of(wb, system, seed=0))]
        _warm_up(wb, dialogue, task)
        wb.reclaim()
        before = wb.memory.process
        answers: list[Answer] = []
        sent: list[tuple[list[dict[str, Any]], str]] = []
        for step in range(steps):
            bench.say(f"step {step + 1} of {steps}")
            asked = text_of(wb, task, seed=step)
            sent.append(([*dialogue], asked))
            turn = wb.engine.submit([*dialogue, user(asked, screen(step))], conversation="agent", replace=True)
            answers.append(turn.result(600))
            dialogue += [said("user", asked), said("assistant", answers[-1].text)]
        wb.drop("agent")
        wb.reclaim()
        bench.say("the same in plain transformers")
        stock = Stock(wb)
        stock.first_token([*sent[0][0], user(sent[0][1], screen(0))])
        stock.release()
        # The screens are drawn again: kept, they would count on a machine whose device is the host.
        theirs = [
            stock.first_token([*history, user(asked, screen(step))]) for step, (history, asked) in enumerate(sent)
        ]
    return bench.report(f"{steps} steps of a phone agent", _figures(answers, theirs, before), *_notes(answers))


def _figures(answers: list[Answer], theirs: list[tuple[float, int | None]], before: int | None) -> list[Figure]:
    figures = []
    ours = [answer.timings.first_token or 0.0 for answer in answers]
    peaks = [max(answer.peak_bytes.values()) - before if answer.peak_bytes and before else None for answer in answers]
    figures.append(
        Figure(
            "time to the first token, median of the steps after the first",
            "s",
            median(ours[1:]),
            {"transformers": median(seconds for seconds, _ in theirs[1:])},
        )
    )
    whole = {"transformers": sum(seconds for seconds, _ in theirs)}
    figures.append(Figure("time to the first token, all steps", "s", sum(ours), whole))
    known = [peak for peak in peaks if peak is not None]
    stock_known = [peak for _, peak in theirs if peak is not None]
    figures.append(
        Figure(
            "peak over the weights, highest step",
            "B",
            max(known, default=None),
            {"transformers": max(stock_known, default=None)},
        )
    )
    reused = [100 * answer.usage.cached_tokens / answer.usage.prompt_tokens for answer in answers[1:]]
    figures.append(Figure("prompt reused, median of the steps after the first", "%", median(reused)))
    for number, (answer, peak, (seconds, stock_peak)) in enumerate(zip(answers, peaks, theirs, strict=True), 1):
        usage = answer.usage
        what = f"step {number}: {usage.prompt_tokens:,} tokens, {usage.cached_tokens:,} reused"
        figures.append(Figure(f"{what}; first token", "s", answer.timings.first_token, {"transformers": seconds}))
        figures.append(Figure(f"{what}; peak", "B", peak, {"transformers": stock_peak}))
    return figures


def _notes(answers: list[Answer]) -> tuple[str, ...]:
    tokens = answers[-1].usage.image_tokens
    return (
        f"Each step has one screenshot of 1080 x 2400, {tokens:,} tokens here; earlier steps are text alone.",
        "Time: from the messages to the first token, on both sides with the image's preparation and encoder.",
        "Peak: over the weights, of the whole answer, as the driver reports it; transformers': of torch's allocator.",
    )


def _warm_up(wb: Workbench, dialogue: list[dict[str, Any]], task: int) -> None:
    """Kernels are loaded and decode steps captured before anything is timed."""
    for step in (1000, 1001):
        messages = [*dialogue, user(text_of(wb, task, seed=step), screen(step))]
        wb.engine.submit(messages, conversation="warm-up", replace=True, max_new_tokens=4).result(600)
    wb.drop("warm-up")
    # What it left behind would be found by the first step.
    policy = wb.policy
    wb.policy = policy.replace(kv={"prefix_bytes": 0, "encoder_bytes": 0})
    wb.policy = policy


@contextmanager
def _image_size(wb: Workbench, longest: int) -> Iterator[None]:
    """Images of at most so many pixels, where the model's images have no fixed size."""
    images: Any = wb.processor.image_processor
    size = images.size
    if getattr(size, "longest_edge", None):
        images.size = {"shortest_edge": 112 * 112, "longest_edge": longest}
    try:
        yield
    finally:
        images.size = size
