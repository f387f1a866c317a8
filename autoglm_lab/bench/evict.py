"""What forgetting by attention costs, beside forgetting by age: right answers of the embedded model, and SmolLM2."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from autoglm_lab.bench import perplexity as texts
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.heldout import SEED, Outcome, Recipe, answered
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.bench.stock import Stock
from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.prompt import Prompt
from autoglm_lab.errors import LabError
from autoglm_lab.memory.kv.eviction import Eviction
from autoglm_lab.opening import load
from autoglm_lab.workbench import Workbench

LIMITS = ((256, 64), (128, 16))
"""Tokens and sinks of the recalls."""
GROWING = (512, 64)
"""Tokens and sinks of a text that is read in pieces."""
READ, CUT, THEN = 768, 256, 128
"""Tokens that are read, those that are left of them, and those that are foretold after the cut."""
_SMALL, _FULL = 8, 256
_CONTEXTS = 4
_NOTHING_KEPT = {"reuse": False, "prefix_bytes": 0, "encoder_bytes": 0, "max_conversations": 32}
_PLAIN = {"overflow": "stop", "max_tokens": None}


def run(bench: Bench) -> Report:
    """Right answers and perplexities at the same limits.

    Raises:
        LabError: there is neither a checkout of the project for the dialogues, nor a folder of SmolLM2.
    """
    figures: list[Figure] = []
    notes: list[str] = []
    for part in (_recalls, _foretold):
        try:
            made, said = part(bench)
        except LabError as error:
            notes.append(f"Left out: {error}.")
        else:
            figures += made
            notes += said
    if not figures:
        raise LabError("; ".join(notes))
    return Report("forgetting by attention (float32)", bench.machine(), tuple(figures), tuple(notes))


def _recalls(bench: Bench) -> tuple[list[Figure], list[str]]:
    recipe, wb = Recipe(), bench.exact
    count = bench.dialogues or (_SMALL if bench.small else _FULL)
    dialogues, before = recipe.dialogues("recall", count), wb.policy
    wb.policy = before.replace(
        kv=_NOTHING_KEPT | _PLAIN, reclaim={"every_answers": None, "cached_share": None}, generation={"eos": True}
    )
    bench.say("recall: all is kept")
    exact, figures, told = answered(wb, recipe, dialogues), [], []
    for tokens, sinks in LIMITS:
        found: dict[str, Outcome] = {}
        for overflow in ("window", "evict"):
            bench.say(f"recall: {overflow}, {tokens} tokens")
            wb.policy = wb.policy.replace(kv={"overflow": overflow, "max_tokens": tokens, "sinks": sinks})
            found[overflow] = answered(wb, recipe, dialogues)
        evicted, window = found["evict"], found["window"]
        beside = {"window": window.share, "all kept": exact.share}
        name = f"recall, {tokens} tokens with {sinks} sinks: right"
        figures.append(Figure(name, "%", evicted.share, beside, interval=evicted.interval))
        told.append(_told(tokens, evicted, window))
    wb.policy = before
    how = (
        f"Recalls: {count} dialogues that recipes/tiny draws, seed {SEED}, through the engine's turns; an answer "
        "counts only if it is right as a whole. Intervals: Wilson's."
    )
    return figures, [how, *told]


def _told(tokens: int, evicted: Outcome, window: Outcome) -> str:
    lost, won = evicted.against(window)
    text = f"{tokens} tokens: {won} won and {lost} lost against the window; where tokens were forgotten, "
    text += f"{_survived(evicted)} are right (window {_survived(window)})"
    if any(evicted.refused):
        text += f"; {sum(evicted.refused)} have a turn that does not fit and are refused (window {sum(window.refused)})"
    return f"{text}."


def _survived(outcome: Outcome) -> str:
    right = sum(now for now, forgot in zip(outcome.right, outcome.forgot, strict=True) if forgot)
    return f"{right} of {sum(outcome.forgot)}"


def _foretold(bench: Bench) -> tuple[list[Figure], list[str]]:
    if bench.smollm2 is None:
        raise LabError("SmolLM2's perplexity needs its folder: name it with --smollm2")
    with load(bench.smollm2, dtype="float32", device=str(bench.device)) as wb:
        if wb.processor is None:
            raise LabError(f"{bench.smollm2} has no tokenizer: save it beside the weights (tokenizer.json)")
        wb.policy = wb.policy.replace(kv=_NOTHING_KEPT | _PLAIN)
        text = texts.documentation()
        count = 2 if bench.small and not bench.dialogues else _CONTEXTS
        contexts = texts.contexts(getattr(wb.processor, "tokenizer", wb.processor), text)[:count]
        how = (
            f"Perplexity: {count} contexts of {texts.CONTEXT:,} tokens of documentation, SHA-256 {texts.digest(text)}; "
            f"the growing one is read {texts.CHUNK} tokens at a time. Those that go are chosen by what was read, never "
            "by what is foretold. Intervals: 1.96 standard errors over the contexts."
        )
        grown = _growing(bench, wb, contexts)
        once, absent = _cut_once(bench, wb, contexts)
        return [*grown, *once], [how, *absent]


def _growing(bench: Bench, wb: Workbench, contexts: Sequence[tuple[int, ...]]) -> list[Figure]:
    """A text that grows beyond the limit."""
    tokens, sinks = GROWING
    kept: dict[str, list[Tensor]] = {}
    settings: dict[str, dict[str, Any]] = {
        "all": {}, "window": {"window": GROWING}, "evict": {"eviction": Eviction(tokens, sinks, 32)},
    }  # fmt: skip
    for name, setting in settings.items():
        bench.say(f"perplexity, {tokens:,} tokens: {name}")
        kept[name] = [texts.losses(wb, ids, **setting)[tokens:] for ids in contexts]
    more, interval = texts.change(kept["evict"], kept["all"])
    peers = {"window": texts.change(kept["window"], kept["all"])[0]}
    name = f"SmolLM2's perplexity after the first {tokens} tokens, {tokens} kept: higher by"
    return [Figure(name, "%", more, peers, interval=interval)]


def _cut_once(bench: Bench, wb: Workbench, contexts: Sequence[tuple[int, ...]]) -> tuple[list[Figure], list[str]]:
    """A prompt that is cut once when it was read, as the libraries do it."""
    costs: dict[str, list[Tensor]] = {}
    ways: dict[str, dict[str, Any]] = {
        "all": {}, "window": {"window": (READ, 16)}, "evict": {"eviction": Eviction(READ, 16, 64)},
    }  # fmt: skip
    for name, way in ways.items():
        bench.say(f"perplexity, cut once: {name}")
        costs[name] = [_ours_after(wb, ids, way) for ids in contexts]
    peers: dict[str, float | None] = {"window": texts.change(costs["window"], costs["all"])[0]}
    absent: list[str] = []
    try:
        for name, press in _presses():
            bench.say(f"perplexity, cut once: {name}")
            peers[name] = texts.change([_pressed(Stock(wb).model, ids, press) for ids in contexts], costs["all"])[0]
    except ImportError as error:
        absent.append(f"kvpress was left out: {error}.")
    more, interval = texts.change(costs["evict"], costs["all"])
    name = f"SmolLM2's perplexity of {THEN} tokens after {READ} cut to {CUT}: higher by"
    return [Figure(name, "%", more, peers, interval=interval)], absent


@torch.no_grad()
def _ours_after(wb: Workbench, ids: Sequence[int], way: dict[str, Any]) -> Tensor:
    """Nats that each of the `THEN` tokens but the first costs, after the others were cut to `CUT`."""
    stepper, kept = wb.engine.state.stepper, KvState(wb.engine.state.pool)
    kept.window, kept.eviction = way.get("window"), way.get("eviction")
    try:
        stepper.prefill(kept, Prompt(tuple(ids[:READ]), None, ()), 0)
        if way:
            stepper.make_room(kept, READ - CUT)
            assert kept.held <= CUT
        kept.window = kept.eviction = None
        return texts.losses_after(wb, kept, ids[: READ + THEN])
    finally:
        kept.clear()


@torch.no_grad()
def _pressed(model: Any, ids: Sequence[int], press: AbstractContextManager[Any]) -> Tensor:
    """The same from plain transformers with a cache that a press of kvpress cuts."""
    cache, given = DynamicCache(config=model.config), torch.tensor([list(ids[: READ + THEN])], device=model.device)
    places = torch.arange(READ + THEN, device=model.device)
    with press(model):  # type: ignore[operator]
        # What it takes from the layers' arguments, transformers passes no more of its own accord.
        model(input_ids=given[:, :READ], past_key_values=cache, cache_position=places[:READ])
    logits = model(input_ids=given[:, READ:], past_key_values=cache, position_ids=places[None, READ:]).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1].float(), given[0, READ + 1 :], reduction="none")


def _presses() -> Iterator[tuple[str, Any]]:
    """Kvpress's ways to cut, where it is installed. Raises `ImportError`."""
    kvpress = importlib.import_module("kvpress")

    ratio = 1 - CUT / READ
    yield "kvpress SnapKV", kvpress.SnapKVPress(compression_ratio=ratio)
    yield "kvpress ExpectedAttention", kvpress.ExpectedAttentionPress(compression_ratio=ratio)
