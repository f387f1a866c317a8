"""What lossy settings cost: right answers of the embedded model, perplexity of SmolLM2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from autoglm_lab.bench import perplexity as texts
from autoglm_lab.bench import weight_quality
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.heldout import SEED, Outcome, Recipe, answered
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.bench.stock import Stock
from autoglm_lab.errors import LabError
from autoglm_lab.opening import load
from autoglm_lab.workbench import Workbench

TASKS = ("tap", "recall")
_SMALL, _FULL = 8, 128
_CONTEXTS = 20
_PLAIN = {"precision": "model", "overflow": "stop", "max_tokens": None}
_CACHE_NOTE = (
    "QuantizedCache keeps up to 128 of the latest tokens as the model computes them, and groups 64 numbers; with fp8 "
    "it keeps none and has one scale for all."
)
_KEPT = {"reuse": False, "prefix_bytes": 0, "prefix_host_bytes": 0, "encoder_bytes": 0, "max_conversations": 32}


@dataclass(frozen=True)
class Setting:
    """A lossy setting: its name and what it is in ``policy.kv``."""

    name: str
    kv: dict[str, Any]

    @classmethod
    def window(cls, tokens: int, sinks: int) -> Setting:
        kv = {"overflow": "window", "max_tokens": tokens, "sinks": sinks}
        return cls(f"window of {tokens} tokens with {sinks} sinks", kv)


_PRECISIONS = (Setting("int8", {"precision": "int8"}), Setting("int4", {"precision": "int4"}))
ANSWERED = (*_PRECISIONS, Setting.window(256, 64), Setting.window(96, 16))
"""The first window cuts most of the recalls and no tap, the second the taps too."""
FORETOLD = (*_PRECISIONS, Setting.window(512, 64))


def run(bench: Bench) -> Report:
    """Right answers with and without each lossy setting, and how much higher the perplexity is.

    Raises:
        LabError: there is neither a checkout of the project for the dialogues, nor a folder of SmolLM2.
    """
    figures: list[Figure] = []
    notes: list[str] = []
    missing: list[str] = []
    for part in (_answers, _perplexity):
        try:
            made, said = part(bench)
        except _MissingError as error:
            missing.append(str(error))
        else:
            figures += made
            notes += said
    if not figures:
        raise LabError("; ".join(missing))
    return Report("what lossy settings cost (float32)", bench.machine(), tuple(figures), (*notes, *missing))


class _MissingError(LabError):
    """What a part needs is not there."""


def _answers(bench: Bench) -> tuple[list[Figure], list[str]]:
    """Held-out taps and recalls of the embedded model."""
    try:
        recipe = Recipe()
    except LabError as error:
        raise _MissingError(f"Taps and recalls were left out: {error}.") from None
    wb, count = bench.exact, bench.dialogues or (_SMALL if bench.small else _FULL)
    before = wb.policy
    wb.policy = before.replace(
        kv=_KEPT | _PLAIN, reclaim={"every_answers": None, "cached_share": None}, generation={"eos": True}
    )
    figures: list[Figure] = []
    lost: list[str] = []
    for task in TASKS:
        dialogues = recipe.dialogues(task, count)
        bench.say(f"{task}: {count} dialogues, plain generate")
        right = recipe.stock(Stock(wb).model, wb.processor, dialogues)
        bench.say(f"{task}: as the model")
        exact = answered(wb, recipe, dialogues)
        figures.append(_figure(task, "as the model computes", exact, {"transformers": 100 * right / count}))
        for setting in ANSWERED:
            bench.say(f"{task}: {setting.name}")
            wb.policy = wb.policy.replace(kv=_PLAIN | setting.kv)
            outcome = answered(wb, recipe, dialogues)
            wb.policy = wb.policy.replace(kv=_PLAIN)
            figures.append(_figure(task, setting.name, outcome, {"as the model": exact.share}))
            lost.append(_losses(task, setting, outcome, exact))
        figures += weight_quality.answers(bench, recipe, task, exact, dialogues)
    wb.policy = before
    how = (
        f"Taps and recalls: {count} dialogues each that recipes/tiny draws, seed {SEED}, through the engine's turns; "
        "an answer counts only if it is right as a whole. Intervals: Wilson's."
    )
    return figures, [how, *lost]


def _figure(task: str, setting: str, outcome: Outcome, peers: dict[str, float | None]) -> Figure:
    return Figure(f"{task}, {setting}: right", "%", outcome.share, peers, interval=outcome.interval)


def _losses(task: str, setting: Setting, outcome: Outcome, exact: Outcome) -> str:
    """What became of the dialogues one by one, which says more than two intervals that overlap."""
    lost, won = outcome.against(exact)
    text = f"{task}, {setting.name}: {lost} lost and {won} won against the model's own precision"
    if "max_tokens" in setting.kv:
        kept = [now for now, forgot in zip(outcome.right, outcome.forgot, strict=True) if forgot]
        text += f"; the window forgot tokens in {sum(outcome.forgot)}, of which {sum(kept)} were right"
    if any(outcome.refused):
        text += f"; {sum(outcome.refused)} did not fit it and were refused"
    return f"{text}."


def _perplexity(bench: Bench) -> tuple[list[Figure], list[str]]:
    """How well SmolLM2 foretells documentation, a chunk at a time."""
    if bench.smollm2 is None:
        raise _MissingError("SmolLM2's perplexity was left out: name its folder with --smollm2.")
    with load(bench.smollm2, dtype="float32", device=str(bench.device)) as wb:
        if wb.processor is None:
            raise LabError(f"{bench.smollm2} has no tokenizer: save it beside the weights (tokenizer.json)")
        return _foretold(bench, wb, 2 if bench.small and not bench.dialogues else _CONTEXTS)


def _foretold(bench: Bench, wb: Workbench, count: int) -> tuple[list[Figure], list[str]]:
    text = texts.documentation()
    contexts = texts.contexts(getattr(wb.processor, "tokenizer", wb.processor), text)[:count]
    stock = Stock(wb).model

    def ours(setting: dict[str, Any], name: str) -> list[Tensor]:
        bench.say(f"perplexity: {name}")
        wb.policy = wb.policy.replace(kv=_KEPT | _PLAIN | setting)
        kv = wb.policy.kv
        window = (kv.max_tokens, kv.sinks) if kv.overflow == "window" and kv.max_tokens else None
        return [texts.losses(wb, ids, window=window) for ids in contexts]

    def theirs(make: Callable[[], Cache], name: str) -> list[Tensor]:
        bench.say(f"perplexity: transformers' {name}")
        return [texts.stock_losses(stock, make(), ids) for ids in contexts]

    exact = ours({}, "as the model computes")
    plain = theirs(lambda: DynamicCache(config=stock.config), "DynamicCache")
    peers: dict[str, dict[str, float | None]] = {}
    absent: list[str] = []
    for beside, peer, make in _quantised(stock.config):
        try:
            peers.setdefault(beside, {})[peer] = texts.change(theirs(make, peer), plain)[0]
        except ImportError:
            absent.append(peer)
    figures = [
        Figure(
            "SmolLM2's perplexity, as the model computes", "", texts.perplexity(exact),
            {"transformers": texts.perplexity(plain)},
        )
    ]  # fmt: skip
    for setting in FORETOLD:
        costs = ours(setting.kv, setting.name)
        more, interval = texts.change(costs, exact)
        name = f"SmolLM2's perplexity, {setting.name}: higher by"
        figures.append(Figure(name, "%", more, peers.get(setting.name, {}), interval=interval))
        most = setting.kv.get("max_tokens")
        if most is not None:
            more, interval = texts.change([one[most:] for one in costs], [one[most:] for one in exact])
            figures.append(Figure(f"the same, of the tokens after the first {most}", "%", more, interval=interval))
    wb.policy = wb.policy.replace(kv=_PLAIN)
    kept, how = weight_quality.perplexities(bench, wb.policy, contexts, exact)
    figures += kept
    notes = [_text_note(text, len(contexts)), _CACHE_NOTE, how]
    if absent:
        notes.append(f"Not installed, and left out: {', '.join(absent)}.")
    return figures, notes


def _text_note(text: str, contexts: int) -> str:
    digest = texts.digest(text)
    other = "" if digest == texts.TEXT_DIGEST else f" (another text than that of {texts.TEXT_DIGEST} in the docs)"
    return (
        f"Perplexity: {contexts * (texts.CONTEXT - 1):,} tokens in {contexts} contexts of {texts.CONTEXT:,}, read "
        f"{texts.CHUNK} at a time, of the documentation strings of transformers' {' and '.join(texts.TEXT)}, SHA-256 "
        f"{digest}…{other}. Intervals: 1.96 standard errors over the contexts."
    )


def _quantised(config: Any) -> Iterator[tuple[str, str, Callable[[], Cache]]]:
    """Quantised caches of transformers, beside the setting of ours that takes about as many bits."""
    for beside, backend, bits, axis in (
        ("int8", "fp8", None, None),
        ("int8", "hqq", 8, 1),
        ("int4", "hqq", 4, 1),
        ("int4", "quanto", 4, 0),
    ):
        options: dict[str, Any] = {} if bits is None else {"nbits": bits, "axis_key": axis, "axis_value": axis}
        name = backend if bits is None else f"{backend}, {bits} bits"
        yield beside, name, _maker(backend, config, options)


def _maker(backend: str, config: Any, options: dict[str, Any]) -> Callable[[], Cache]:
    return lambda: QuantizedCache(backend, config, **options)
