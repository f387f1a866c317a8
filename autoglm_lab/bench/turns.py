"""A new turn on a long conversation that is kept, beside the bare forward of its tokens and a reading anew."""

from __future__ import annotations

from statistics import median

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.prompts import prompt_of, screen, text_of
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.bench.stock import Stock
from autoglm_lab.engine.protocol import Answer
from autoglm_lab.workbench import Workbench

_SLOWER = 1.2
_CONVERSATIONS = 8
_NEW = 64


def run(bench: Bench) -> Report:
    """64 new tokens on 8,192 that are kept: one conversation, then eight in turn."""
    wb = bench.workbench
    kept, times = (256, 2) if bench.small else (8192, 7)
    wb.policy = wb.policy.replace(
        kv={"max_conversations": _CONVERSATIONS + 1},
        reclaim={"every_answers": None, "cached_share": None},
        generation={"max_new_tokens": 1, "eos": False},
    )
    bench.say(f"the bare forward of {_NEW} tokens on {kept:,}")
    bare = _bare(bench, wb, kept, times)
    bench.say("one conversation")
    said = _said(wb)
    _ask(wb, "one", prompt_of(wb, kept, seed=0))
    answers = [_ask(wb, "one", text_of(wb, said, seed)) for seed in range(1, times + 2)][1:]
    alone = median(_first(answer) for answer in answers)
    new = answers[0].usage.prompt_tokens - answers[0].usage.cached_tokens
    bench.say(f"{_CONVERSATIONS} conversations in turn")
    names = [f"turns {number}" for number in range(_CONVERSATIONS)]
    for number, name in enumerate(names):
        _ask(wb, name, prompt_of(wb, kept, seed=100 + number))
    rounds = [_ask(wb, name, text_of(wb, said, seed)) for seed in (1, 2) for name in names]
    in_turn = sorted(_first(answer) for answer in rounds[_CONVERSATIONS:])
    reused = min(answer.usage.cached_tokens / answer.usage.prompt_tokens for answer in rounds)
    for info in wb.conversations:
        wb.drop(info.name)
    bench.say("the same, read anew")
    wb.policy = wb.policy.replace(kv={"reuse": False})
    anew = median(_first(_ask(wb, f"anew {seed}", prompt_of(wb, kept, seed=seed))) for seed in range(3))
    for info in wb.conversations:
        wb.drop(info.name)
    equal, asked = _equal(bench.exact)
    peers = {"the bare forward": bare, "read anew": anew}
    bar = f"<= {_SLOWER} x the bare forward"
    figures = [
        Figure(
            f"{new} new tokens on {kept:,} kept: time to the first token",
            "s",
            alone,
            peers,
            bar=bar,
            meets=bench.judge(alone <= _SLOWER * bare),
        ),
        Figure(
            f"the same, {_CONVERSATIONS} conversations in turn: median",
            "s",
            median(in_turn),
            peers,
            bar=bar,
            meets=bench.judge(median(in_turn) <= _SLOWER * bare),
        ),
        Figure(f"the same, {_CONVERSATIONS} conversations in turn: slowest", "s", in_turn[-1], peers),
        Figure("least share of a prompt that was reused", "%", 100 * reused),
        Figure(
            f"answers equal to those without reuse, of {asked} (embedded model, float32)",
            "",
            equal,
            limit=asked,
            bar="all",
            meets=equal == asked,
        ),
    ]
    return bench.report(
        "turns",
        figures,
        "Ours: from the message to the first token, the rendering of the whole dialogue included. The bare forward: "
        f"{_NEW} tokens through plain transformers on a DynamicCache that holds the rest, nothing else.",
    )


def _first(answer: Answer) -> float:
    assert answer.timings.first_token is not None
    return answer.timings.first_token


def _ask(wb: Workbench, conversation: str, text: str) -> Answer:
    return wb.chat(text, conversation=conversation).result(600)


def _said(wb: Workbench) -> int:
    """Tokens to say so that a turn, its markers and the last answer's token included, reads `_NEW` new ones."""
    _ask(wb, "probe", text_of(wb, _NEW, seed=0))
    text = text_of(wb, _NEW // 2, seed=1)
    usage = _ask(wb, "probe", text).usage
    wb.drop("probe")
    return _NEW - (usage.prompt_tokens - usage.cached_tokens - _NEW // 2)


def _bare(bench: Bench, wb: Workbench, kept: int, times: int) -> float:
    stock = Stock(wb)
    _, cache = stock.read(stock.batch([{"role": "user", "content": prompt_of(wb, kept, seed=0)}]))
    ids = list(range(300, 300 + _NEW))
    seconds = []
    for _ in range(times + 2):
        bench.synchronize()
        seconds.append(bench.timed(lambda: int(stock.follow(ids, cache).argmax())))
    return median(seconds[2:])


def _equal(wb: Workbench) -> tuple[int, int]:
    """How many answers of two dialogues with images, held in turn, equal those of a run that keeps nothing."""
    questions = ["Tap the red icon", "Who are you?", "And the one below?"]

    def dialogues(keep: bool) -> list[str]:
        before = wb.policy
        wb.policy = before.replace(kv={"reuse": keep}, generation={"max_new_tokens": 24})
        answers = []
        for number, question in enumerate(questions):
            for name in ("equal a", "equal b"):
                image = screen(seed=ord(name[-1]), width=224, height=224) if number != 1 else None
                answers.append(wb.chat(question, image=image, conversation=name).result(600).text)
        for name in ("equal a", "equal b"):
            wb.drop(name)
        wb.policy = before
        return answers

    kept, anew = dialogues(keep=True), dialogues(keep=False)
    return sum(one == other for one, other in zip(kept, anew, strict=True)), len(kept)
