"""What lossy settings cost: right answers and agreement of the embedded model, perplexity of SmolLM2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from autoglm_lab.bench import perplexity as texts
from autoglm_lab.bench.agreement import Agreement, agreement, readings
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.heldout import SEED, Outcome, Recipe, answered
from autoglm_lab.bench.lossy_settings import ANSWERED, FORETOLD, PLAIN, Setting, opened
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.bench.stock import Stock
from autoglm_lab.errors import LabError
from autoglm_lab.opening import load
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.workbench import Workbench

TASKS = ("tap", "recall")
_SMALL, _FULL = 8, 128
_COMPARED = 24
_MOST_CONTEXTS = 20
_QUICK = {"KV in int8", "KV in int4", "text in int4, head in int8", "text in 2:4"}
_CACHE_NOTE = (
    "QuantizedCache keeps up to 128 of the latest tokens as the model computes them, and groups 64 numbers; with fp8 "
    "it keeps none and has one scale for all."
)
_KEPT = {"reuse": False, "prefix_bytes": 0, "prefix_host_bytes": 0, "encoder_bytes": 0, "max_conversations": 32}


def run(bench: Bench) -> Report:
    """Right answers with and without each lossy setting, how near its distributions are, and how much higher the
    perplexity is. Each setting is kept as soon as it was measured: `costs_page` makes the table of them. Where ``rows``
    names some of the settings, peers are left out.

    Raises:
        LabError: there is neither a checkout of the project for the dialogues, nor a folder of SmolLM2.
    """
    figures: list[Figure] = []
    notes: list[str] = []
    missing: list[str] = []
    bench.keep({"run": bench.machine() | {"dialogues": str(_count(bench))}})
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


def _count(bench: Bench) -> int:
    return bench.dialogues or (_SMALL if bench.small else _FULL)


def _chosen(bench: Bench, settings: tuple[Setting, ...]) -> Iterator[Setting]:
    """All settings, those that ``rows`` names, or few in a small run."""
    for one in settings:
        if bench.wants(one.name) and (bench.rows or not _quick(bench) or one.name in _QUICK):
            yield one


def _quick(bench: Bench) -> bool:
    return bench.small and not bench.dialogues


def _answers(bench: Bench) -> tuple[list[Figure], list[str]]:
    """Held-out taps and recalls of the embedded model."""
    try:
        recipe = Recipe()
    except LabError as error:
        raise _MissingError(f"Taps and recalls were left out: {error}.") from None
    wb, count = bench.exact, _count(bench)
    before = wb.policy
    policy = before.replace(
        kv=_KEPT | PLAIN, reclaim={"every_answers": None, "cached_share": None}, generation={"eos": True}
    )
    wb.policy = policy
    dialogues = {task: recipe.dialogues(task, count) for task in TASKS}
    exact: dict[str, Outcome] = {}
    figures: dict[str, list[Figure]] = {task: [] for task in (*TASKS, "agreement")}
    notes: list[str] = []
    for task in TASKS:
        bench.say(f"{task}: {count} dialogues, as the model")
        exact[task] = answered(wb, recipe, dialogues[task])
        peers: dict[str, float | None] = {}
        if not bench.rows:
            right = recipe.stock(Stock(wb).model, wb.processor, dialogues[task])
            peers["transformers"] = 100 * right / count
        figures[task].append(_figure(task, "as the model computes", exact[task], peers))
    few = 2 if _quick(bench) else _COMPARED
    read = readings(wb, recipe, [dialogue for task in TASKS for dialogue in dialogues[task][:few]])
    bench.keep(_entry(Setting("as the model computes"), exact, exact, None))
    for setting in _chosen(bench, ANSWERED):
        bench.say(f"answers: {setting.name}")
        with opened(setting, wb, "autoglm-tiny", policy) as under:
            outcomes = {task: answered(under, recipe, dialogues[task]) for task in TASKS}
            near = agreement(under, read) if setting.keeps_all else None
        bench.keep(_entry(setting, outcomes, exact, near))
        for task, outcome in outcomes.items():
            figures[task].append(_figure(task, setting.name, outcome, {"as the model": exact[task].share}))
            notes.append(_losses(task, setting, outcome, exact[task]))
        if near is not None:
            figures["agreement"] += _agreement(setting, near)
    wb.policy = before
    how = (
        f"Taps and recalls: {count} dialogues each that recipes/tiny draws, seed {SEED}, through the engine's turns; "
        "an answer counts only if it is right as a whole. Intervals: Wilson's."
    )
    compared = (
        f"Same likeliest token and divergence: along the model's own answers to {2 * min(few, count)} of them; "
        "intervals: 1.96 standard errors over the dialogues."
    )
    return [one for group in figures.values() for one in group], [how, compared, *notes]


def _entry(
    setting: Setting, outcomes: dict[str, Outcome], exact: dict[str, Outcome], near: Agreement | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {"setting": setting.name, "kind": setting.kind, "kv": dict(setting.kv)}
    entry |= {"weights": dict(setting.weights), "bytes": setting.phone_bytes()}
    for task, outcome in outcomes.items():
        entry[task] = {"share": outcome.share, "interval": list(outcome.interval)}
        entry[task] |= {"before": exact[task].share, "count": len(outcome.right)}
    if near is not None:
        entry |= {"top1": near.top1, "divergence": near.divergence, "divergence_interval": list(near.interval)}
    return entry


def _figure(task: str, setting: str, outcome: Outcome, peers: dict[str, float | None]) -> Figure:
    return Figure(f"{task}, {setting}: right", "%", outcome.share, peers, interval=outcome.interval)


def _agreement(setting: Setting, near: Agreement) -> Iterator[Figure]:
    yield Figure(f"{setting.name}: same likeliest token", "%", near.top1)
    yield Figure(f"{setting.name}: divergence", "nats", near.divergence, interval=near.interval)


def _losses(task: str, setting: Setting, outcome: Outcome, exact: Outcome) -> str:
    """What became of the dialogues one by one, which says more than two intervals that overlap."""
    lost, won = outcome.against(exact)
    text = f"{task}, {setting.name}: {lost} lost and {won} won against the model's own precision"
    if setting.kv.get("overflow") == "window":
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
        count = min(_MOST_CONTEXTS, max(2, _count(bench) // 12))  # a context costs as much as a dozen dialogues
        return _foretold(bench, wb, bench.smollm2, count)


def _foretold(bench: Bench, wb: Workbench, folder: Path, count: int) -> tuple[list[Figure], list[str]]:
    text = texts.documentation()
    contexts = texts.contexts(getattr(wb.processor, "tokenizer", wb.processor), text)[:count]
    stock = Stock(wb).model
    policy = MemoryPolicy(kv=_KEPT | PLAIN)
    wb.policy = policy

    def ours(setting: Setting) -> list[Tensor]:
        bench.say(f"perplexity: {setting.name}")
        kv = setting.kv
        window = (kv["max_tokens"], kv["sinks"]) if not setting.keeps_all else None
        # Where all is exact but the weights, how a context is cut makes no difference.
        chunk = texts.CHUNK if setting.kv or not setting.weights else texts.CONTEXT
        with opened(setting, wb, str(folder), policy) as under:
            return [texts.losses(under, ids, window=window, chunk=chunk) for ids in contexts]

    def theirs(make: Callable[[], Cache], name: str) -> list[Tensor]:
        bench.say(f"perplexity: transformers' {name}")
        return [texts.stock_losses(stock, make(), ids) for ids in contexts]

    exact = ours(Setting("as the model computes"))
    plain = exact if bench.rows else theirs(lambda: DynamicCache(config=stock.config), "DynamicCache")
    bench.keep({"setting": "as the model computes", "perplexity": {"value": texts.perplexity(exact)}})
    peers: dict[str, dict[str, float | None]] = {}
    absent: list[str] = []
    for beside, peer, make in () if bench.rows else _quantised(stock.config):
        try:
            change = texts.change(theirs(make, peer), plain)[0]
        except ImportError:
            absent.append(peer)
        else:
            peers.setdefault(beside, {})[peer] = change
            bench.keep({"peer": peer, "beside": beside, "perplexity": {"more": change}})
    figures = [
        Figure(
            "SmolLM2's perplexity, as the model computes", "", texts.perplexity(exact),
            {} if bench.rows else {"transformers": texts.perplexity(plain)},
        )
    ]  # fmt: skip
    for setting in _chosen(bench, FORETOLD):
        costs = ours(setting)
        more, interval = texts.change(costs, exact)
        bench.keep({"setting": setting.name, "perplexity": {"more": more, "interval": list(interval)}})
        name = f"SmolLM2's perplexity, {setting.name}: higher by"
        figures.append(Figure(name, "%", more, peers.get(setting.name, {}), interval=interval))
        most = setting.kv.get("max_tokens")
        if most is not None:
            more, interval = texts.change([one[most:] for one in costs], [one[most:] for one in exact])
            figures.append(Figure(f"the same, of the tokens after the first {most}", "%", more, interval=interval))
    notes = [_text_note(text, len(contexts)), _CACHE_NOTE]
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
        ("KV in int8", "fp8", None, None),
        ("KV in int8", "hqq", 8, 1),
        ("KV in int4", "hqq", 4, 1),
        ("KV in int4", "quanto", 4, 0),
    ):
        options: dict[str, Any] = {} if bits is None else {"nbits": bits, "axis_key": axis, "axis_value": axis}
        name = backend if bits is None else f"{backend}, {bits} bits"
        yield beside, name, _maker(backend, config, options)


def _maker(backend: str, config: Any, options: dict[str, Any]) -> Callable[[], Cache]:
    return lambda: QuantizedCache(backend, config, **options)
