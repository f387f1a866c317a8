"""Reading a prompt: time to the first token, and the most bytes over the weights. Ours against plain transformers."""

from __future__ import annotations

from statistics import median

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.limits import matmul_rate, prefill_seconds
from autoglm_lab.bench.prompts import prompt_of, user
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.bench.stock import Stock
from autoglm_lab.engine.protocol import Answer
from autoglm_lab.workbench import Workbench

_SLACK = 250_000_000
_SLOWER = 1.1
_JUDGED = 8192


def run(bench: Bench) -> Report:
    """Time and peak for prompts of several lengths; the bars are those of 8,192 tokens."""
    wb = bench.workbench
    lengths, times = ((64, 256), 2) if bench.small else ((1024, 4096, _JUDGED), 5)
    wb.policy = wb.policy.replace(
        kv={"reuse": False, "prefix_bytes": 0, "encoder_bytes": 0},
        reclaim={"every_answers": None, "cached_share": None},
        generation={"max_new_tokens": 1, "eos": False},
    )
    stock = Stock(wb)
    rate = matmul_rate(bench.device, wb.model.dtype)
    figures: list[Figure] = []
    for tokens in lengths:
        bench.say(f"prefill of {tokens:,} tokens")
        text = prompt_of(wb, tokens, seed=tokens)
        for _ in range(2):
            read(wb, text)
            stock.first_token([user(text)])
        over, answer = peak_over_weights(wb, text)
        (info,) = wb.conversations
        kv_bytes = info.kv_bytes or 0
        seconds = median(read(wb, text).timings.first_token or 0.0 for _ in range(times))
        wb.drop(info.name)
        wb.reclaim()
        stock.release()
        theirs = [stock.first_token([user(text)]) for _ in range(times + 1)]
        stock_seconds, stock_over = median(one[0] for one in theirs[1:]), theirs[0][1]
        judged = tokens == lengths[-1]
        figures.append(
            Figure(
                f"{answer.usage.prompt_tokens:,} tokens: time to the first token",
                "s",
                seconds,
                {"transformers": stock_seconds},
                limit=prefill_seconds(wb, tokens, rate),
                bar=f"<= {_SLOWER} x transformers" if judged else "",
                meets=bench.judge(seconds <= _SLOWER * stock_seconds) if judged else None,
            )
        )
        figures.append(
            Figure(
                f"{answer.usage.prompt_tokens:,} tokens: peak over the weights",
                "B",
                over,
                {"transformers": stock_over},
                limit=kv_bytes,
                bar="<= its KV + 0.25 GB" if judged else "",
                meets=None if over is None or not judged else bench.judge(over <= kv_bytes + _SLACK),
            )
        )
    return bench.report(
        "prefill",
        figures,
        "Time: from the messages to the first token, rendering included, on both sides; the median of "
        f"{times} runs after two that warm up.",
        "Peak: ours, what the process held at most as the driver reports it, less what it held before; transformers', "
        "what torch's allocator reserved at most, less what it had before. Both begin with an empty cache.",
        "Limit of the time: the operations of the layers and of attention at the rate of one large matrix product, "
        f"{rate / 1e12:.3g} TFLOP/s in this run. Limit of the peak: the keys and values themselves.",
    )


def read(wb: Workbench, text: str) -> Answer:
    """Read a prompt into the conversation of the bench, begun anew."""
    if any(info.name == "bench" for info in wb.conversations):
        wb.drop("bench")
    return wb.chat(text, conversation="bench").result(600)


def peak_over_weights(wb: Workbench, text: str) -> tuple[int | None, Answer]:
    """Bytes that reading ``text`` took at most, with nothing cached before; None where the machine does not tell."""
    if any(info.name == "bench" for info in wb.conversations):
        wb.drop("bench")
    wb.reclaim()
    before = wb.memory.process
    answer = read(wb, text)
    if before is None or not answer.peak_bytes:
        return None, answer
    return max(answer.peak_bytes.values()) - before, answer
