"""Decoding against ``generate``, keys and values in fewer bytes, and how far the logits are from stock's."""

from __future__ import annotations

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.forced import along, apart, greedy, ours_along
from autoglm_lab.bench.limits import decode_rate, read_rate
from autoglm_lab.bench.prefill import peak_over_weights
from autoglm_lab.bench.prompts import prompt_of, screen, text_of, user
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.bench.stock import Stock
from autoglm_lab.engine.protocol import Answer, Turn
from autoglm_lab.workbench import Workbench

_FASTER = 3.5
_SMALLER = 0.53
_SLACK = 4 << 20


def run(bench: Bench) -> Report:
    """Decoding at several lengths and batches, each precision's bytes, and the lossless settings' logits."""
    wb = bench.workbench
    wb.policy = wb.policy.replace(
        reclaim={"every_answers": None, "cached_share": None}, generation={"max_new_tokens": 1, "eos": False}
    )
    figures = [
        *_decoding(bench, wb),
        *_graphs(wb),
        *_precisions(bench, wb),
        *_logits(bench, wb),
        *_tokens(bench.exact, bench),
    ]
    return bench.report(
        "keys and values",
        figures,
        "Decoding: tokens a second of all conversations of a batch, from the last of them to have its first token to "
        "the first to end; transformers' generate with a dynamic cache, its prompt's time taken off.",
        "Its limit: the layers, the head and the keys and values read once a step, at the rate at which one large "
        "matrix is read to be multiplied with a vector, measured in this run.",
        "Logits: along transformers' own greedy tokens, one token a step, against transformers' sdpa.",
    )


def _decoding(bench: Bench, wb: Workbench) -> list[Figure]:
    contexts, count, theirs = ((64,), 16, 16) if bench.small else ((512, 8192), 129, 33)
    rate = read_rate(bench.device, wb.model.dtype)
    stock = Stock(wb)
    figures = []
    for context in contexts:
        prompts = [prompt_of(wb, context, seed=number) for number in range(4)]
        batches = [stock.batch([user(prompt)]) for prompt in prompts]
        for rows in (1, 4):
            bench.say(f"decoding {rows} at {context:,} tokens")
            wide = {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in batches[0].items()}
            peers = {"generate": stock.decode_rate(wide, theirs)}
            rates = {}
            for graphs in (False, True) if bench.cuda else (True,):
                wb.policy = wb.policy.replace(kv={"graphs": graphs})
                _decode(wb, prompts[:rows], 4)  # captures, where there is something to capture
                rates[graphs] = _decode(wb, prompts[:rows], count if graphs else theirs)
            if False in rates:
                peers["ours, no graphs"] = rates[False]
            ours = rates[True]
            figures.append(
                Figure(
                    f"decoding at {context:,} tokens, batch {rows}",
                    "tokens/s",
                    ours,
                    peers,
                    limit=decode_rate(wb, context * _row_bytes(wb), rows, rate),
                    bar=f">= {_FASTER} x generate",
                    meets=bench.judge(ours >= _FASTER * (peers["generate"] or 0.0)),
                )
            )
    return figures


def _decode(wb: Workbench, prompts: list[str], count: int) -> float:
    """Tokens a second of the conversations together, their prompts being kept already."""
    names = [f"decode {number}" for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        wb.chat(prompt, conversation=name).result(600)
    turns: list[Turn] = [wb.chat("go on", conversation=name, max_new_tokens=count) for name in names]
    answers: list[Answer] = [turn.result(600) for turn in turns]
    for name in names:
        wb.drop(name)
    # All were asked within a millisecond, so their clocks are one.
    first = max(answer.timings.first_token or 0.0 for answer in answers)
    end = min(answer.timings.total for answer in answers)
    shares = [
        (end - first) / (answer.timings.total - (answer.timings.first_token or 0.0)) * (count - 1) for answer in answers
    ]
    return sum(shares) / (end - first)


def _row_bytes(wb: Workbench) -> float:
    """Bytes of keys and values of one token."""
    wb.chat("count me", conversation="row").result(600)
    (info,) = [info for info in wb.conversations if info.name == "row"]
    held = -(-info.tokens // 16) * 16
    wb.drop("row")
    return (info.kv_bytes or 0) / held


def _graphs(wb: Workbench) -> list[Figure]:
    """What the captured steps hold and how long capturing took; nothing where there are none."""
    rows = [row for row in wb.memory.rows if row.name.startswith("decode graphs")]
    events = [event for event in wb.events if event.subject == "decode graphs" and event.seconds]
    if not rows:
        return []
    seconds = max(event.seconds or 0.0 for event in events) if events else None
    figures = [Figure("decode graphs: memory, as the ledger shows it", "B", sum(row.nbytes or 0 for row in rows))]
    meets = None if seconds is None else seconds < 2.0
    figures.append(Figure("decode graphs: the longest capture", "s", seconds, bar="< 2 s", meets=meets))
    return figures


def _precisions(bench: Bench, wb: Workbench) -> list[Figure]:
    tokens = 256 if bench.small else 8192
    text = prompt_of(wb, tokens, seed=5)
    held: dict[str, int] = {}
    peaks: dict[str, int | None] = {}
    for precision in ("model", "int8", "int4"):
        bench.say(f"keys and values in {precision}")
        wb.policy = wb.policy.replace(kv={"precision": precision, "reuse": False, "prefix_bytes": 0})
        peak_over_weights(wb, text)
        peaks[precision], _ = peak_over_weights(wb, text)
        (info,) = [info for info in wb.conversations if info.name == "bench"]
        held[precision] = info.kv_bytes or 0
        wb.drop("bench")
    wb.policy = wb.policy.replace(kv={"precision": "model", "reuse": True})
    figures = []
    for precision in ("int8", "int4"):
        share = held[precision] / held["model"]
        judged = precision == "int8"
        figures.append(
            Figure(
                f"{tokens:,} tokens in {precision}: keys and values",
                "B",
                held[precision],
                {"as the model": held["model"]},
                bar=f"<= {_SMALLER} x" if judged else "",
                meets=bench.judge(share <= _SMALLER) if judged else None,
            )
        )
        peak, before = peaks[precision], peaks["model"]
        down = None if peak is None or before is None else before - peak
        wanted = held["model"] - held[precision]
        figures.append(
            Figure(
                f"{tokens:,} tokens in {precision}: peak over the weights",
                "B",
                peak,
                {"as the model": before},
                bar="down by as much" if judged else "",
                meets=bench.judge(down >= wanted - _SLACK) if judged and down is not None else None,
            )
        )
    return figures


def _logits(bench: Bench, wb: Workbench) -> list[Figure]:
    """How far our logits are from stock's sdpa, beside how far stock's eager attention is."""
    tokens, count = ((48,), 6) if bench.small else ((512, 4096), 32)
    stock, eager = Stock(wb), Stock(wb, "eager")
    ours_max = ours_mean = eager_max = eager_mean = 0.0
    for length in tokens:
        bench.say(f"logits along {count} tokens after {length:,}")
        messages = [user(prompt_of(wb, length, seed=length))]
        ids, reference = greedy(stock, messages, count)
        worst, mean = apart(ours_along(wb, messages, ids), reference)
        ours_max, ours_mean = max(ours_max, worst), max(ours_mean, mean)
        worst, mean = apart(along(eager, messages, ids), reference)
        eager_max, eager_mean = max(eager_max, worst), max(eager_mean, mean)
    dtype = str(wb.model.dtype).removeprefix("torch.")
    bar = "<= eager against sdpa"
    return [
        Figure(f"largest difference of a logit, {dtype}", "", ours_max, {"eager": eager_max}, bar=bar,
               meets=bench.judge(ours_max <= eager_max)),
        Figure(f"mean difference of the logits, {dtype}", "", ours_mean, {"eager": eager_mean}, bar=bar,
               meets=bench.judge(ours_mean <= eager_mean)),
    ]  # fmt: skip


def _tokens(wb: Workbench, bench: Bench) -> list[Figure]:
    """Greedy answers in float32: against plain generate, and a batch of four against four runs of one."""
    bench.say("tokens in float32")
    before, count = wb.policy, 16
    wb.policy = before.replace(kv={"prefix_bytes": 0}, generation={"max_new_tokens": count, "eos": True})
    stock = Stock(wb)
    questions = [
        user("你是谁?"),
        user("Tap the red icon", screen(1, 224, 224)),
        user(text_of(wb, 150, seed=9)),
        user("How many icons are there?", screen(2, 224, 224)),
    ]
    tokenizer = wb.engine.state.tokenizer
    plain, alone = [], []
    for question in questions:
        ids = stock.generate(stock.batch([question]), count, least=1)[0]
        plain.append(_shown(tokenizer.decode(ids, skip_special_tokens=True)))
        alone.append(_answer(wb, [question])[0])
    together = _answer(wb, questions)
    wb.policy = before
    total = len(questions)
    as_stock = sum(one == other for one, other in zip(alone, plain, strict=True))
    as_alone = sum(one == other for one, other in zip(together, alone, strict=True))
    return [
        Figure("answers equal to generate's, float32, embedded model", "", as_stock, limit=total, bar="all",
               meets=as_stock == total),
        Figure("answers of a batch of four equal to runs of one, float32", "", as_alone, limit=total, bar="all",
               meets=as_alone == total),
    ]  # fmt: skip


def _answer(wb: Workbench, questions: list[dict[str, object]]) -> list[str]:
    turns = [wb.engine.submit([one], conversation=f"exact {number}") for number, one in enumerate(questions)]
    answers = [turn.result(120) for turn in turns]
    for number in range(len(questions)):
        wb.drop(f"exact {number}")
    return [_shown(answer.reasoning + answer.text) for answer in answers]


def _shown(text: str) -> str:
    """What a person reads of an answer: without markers."""
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        text = text.replace(tag, "")
    return text
