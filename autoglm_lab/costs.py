"""What lossy settings cost, as measured once and kept in ``costs.json``: shown beside their switches.

`bench.costs_page` writes that file and docs/quality.md from what ``autoglm-lab bench quality`` measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("costs.json")
SETTINGS = {
    "kv int8": "KV in int8",
    "kv int4": "KV in int4",
    "kv window": "window of 256 tokens with 64 sinks",
    "kv evict": "evicted at 256 tokens with 64 sinks",
    "kv drop-oldest-turns": "oldest turns dropped at 256 tokens",
    "weights int8": "text and head in int8",
    "weights int4": "text in int4, head in int8",
    "weights nf4": "text in nf4, head in int8",
    "weights 2:4": "text in 2:4",
}
"""What a value of a switch stands for in the file. What forgets tokens was measured at one limit."""
_WORDS = {
    "tap": ("tap", "点击"),
    "recall": ("recall", "回忆"),
    "same": ("same next token", "下一词元相同"),
    "perplexity": ("SmolLM2 perplexity", "SmolLM2 困惑度"),
    "at": ("at {n} tokens: ", "{n} 词元时："),
}


@functools.cache
def costs() -> Mapping[str, Any]:
    """All that was measured: ``run`` (machine, versions, date, commands) and ``settings``, by name.

    Of a setting: ``tap`` and ``recall`` (right answers, %, and ``before`` it on the same dialogues), ``top1`` (same
    likeliest next token, %), ``divergence`` (Kullback-Leibler, nats a token), ``perplexity`` (higher by, %), ``bytes``
    of the phone model; what was not measured is not there.
    """
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def cost_of(switch: str, lang: Literal["en", "zh"] = "en") -> str:
    """What a value of a switch cost when it was measured; empty where nothing is lost, or nothing was measured.

    Args:
        switch: a key of `SETTINGS`, such as ``kv int4`` or ``weights int8``.
    """
    settings = costs()["settings"]
    entry = settings.get(SETTINGS.get(switch, ""))
    if entry is None:
        return ""
    words = {name: both[lang == "zh"] for name, both in _WORDS.items()}
    told = [
        f"{words[task]} {entry[task]['before']:.1f} → {entry[task]['share']:.1f} %"
        for task in ("tap", "recall")
        if task in entry
    ]
    if "top1" in entry:
        told.append(f"{words['same']} {entry['top1']:.1f} %")
    if "perplexity" in entry:
        more = entry["perplexity"]["more"]
        told.append(f"{words['perplexity']} " + (f"x {1 + more / 100:.0f}" if more > 1000 else f"{more:+.2g} %"))
    limit = entry.get("kv", {}).get("max_tokens")
    return (words["at"].format(n=limit) if limit else "") + ("，" if lang == "zh" else ", ").join(told)
