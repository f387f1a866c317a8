"""Where measured costs go: `python -m autoglm_lab.bench.costs_page FILE.rows.jsonl...`.

Writes ``autoglm_lab/costs.json``, which the dashboard reads, and docs/quality.md, which people read, from what
``autoglm-lab bench quality --json FILE.json`` kept beside its JSON. Of several files a later one wins, by setting.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoglm_lab.bench.heldout import PROJECT
from autoglm_lab.bench.lossy_settings import ANSWERED, FORETOLD
from autoglm_lab.costs import FILE
from autoglm_lab.units import format_bytes

PAGE = PROJECT / "docs" / "quality.md"
_PLAIN = "as the model computes"
_HEAD = ("setting", "tap, right", "recall, right", "same next token", "divergence", "SmolLM2 perplexity", "phone model")
_INTRO = """\
# What lossy settings cost

Written by `python -m autoglm_lab.bench.costs_page` from what the commands below kept. The dashboard shows the same
figures beside the switches. Machine: {where}.

{commands}

"""
_NOTES = """
- **tap, recall**: right answers of the embedded model to so many held-out dialogues, without the setting and with it,
  in float32 but for the setting, with Wilson's 95 % interval. An answer counts only if it is right as a whole.
- **same next token, divergence**: along the model's own answers to {compared} of these dialogues, how often the
  likeliest token is the same, and the Kullback-Leibler divergence from the model without the setting, in millionths
  of a nat a token, with 1.96 standard errors over the dialogues. It tells settings apart that answer as many right.
- **SmolLM2 perplexity**: how much higher that of SmolLM2-135M-Instruct is in float32, on documentation strings of
  transformers, with 1.96 standard errors over the contexts. Its weights come from a 4-bit file (Q4_1) and are rounded
  a second time here: how much of what 4 bits cost comes from that, these figures do not tell.
- **phone model**: bytes of AutoGLM-Phone-9B, counted: its weights in bfloat16 but for the setting, or the keys and
  values of 8,192 tokens.
- The embedded model's and SmolLM2's head is the table of their embeddings, which is kept in int8 wherever the text is
  in 8 or 4 bits. A head of its own, as the phone model has, was not measured.
- **2:4** keeps of each four numbers the two largest, without learning again. Few models stand that: see its rows before
  you use it. `quantize={{"text": "2:4"}}` is there for weights that were trained to be sparse.
- A window, an eviction and dropped turns are no memory: what was forgotten is not known. They cost what they forget.
"""


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """What was kept in some runs: the last one's machine, all their commands and, by name, what each setting cost."""
    found: dict[str, Any] = {"run": {"commands": []}, "settings": {}}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "run" in entry:
                found["run"]["commands"].append(entry["run"].pop("command", ""))
                found["run"] |= entry["run"]
            elif "setting" in entry:
                found["settings"].setdefault(entry.pop("setting"), {}).update(_rounded(entry))
    order = {name: at for at, name in enumerate(dict.fromkeys(one.name for one in (*ANSWERED, *FORETOLD)))}
    found["settings"] = dict(sorted(found["settings"].items(), key=lambda one: order.get(one[0], -1)))
    return found


def page(costs: Mapping[str, Any]) -> str:
    """The table for people, in Markdown."""
    run, settings = costs["run"], costs["settings"]
    named = ("device", "python", "torch", "transformers", "date")
    where = ", ".join(run[name] if name == "device" else f"{name} {run[name]}" for name in named if name in run)
    rows = [_HEAD, ("---",) * len(_HEAD), *(_row(name, one, settings[_PLAIN]) for name, one in settings.items())]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    intro = _INTRO.format(commands="\n".join(f"- `{one}`" for one in run["commands"]), where=where)
    return intro + table + "\n" + _NOTES.format(compared=48) + "".join(_earlier(settings))


def _earlier(settings: Mapping[str, Any]) -> Iterator[str]:
    """What was measured in another run than that of the page's head."""
    runs: dict[str, list[str]] = {}
    for name, one in settings.items():
        if "measured" in one:
            runs.setdefault(one["measured"], []).append(name)
    for run, names in runs.items():
        yield f"- Right answers and perplexity of {', '.join(names)}: measured on {run}.\n"


def _row(name: str, entry: Mapping[str, Any], plain: Mapping[str, Any]) -> tuple[str, ...]:
    cells = [name]
    cells += [_share(entry.get(task)) for task in ("tap", "recall")]
    cells.append(f"{entry['top1']:.2f} %" if "top1" in entry else "")
    cells.append(_divergence(entry) if "divergence" in entry else "")
    cells.append(_perplexity(entry.get("perplexity", {})))
    cells.append(_bytes(entry.get("bytes"), plain["bytes"]))
    return tuple(cells)


def _share(task: Mapping[str, Any] | None) -> str:
    if task is None:
        return ""
    low, high = task["interval"]
    return f"{task['before']:.1f} → {task['share']:.1f} % of {task['count']} ({low:.1f} to {high:.1f})"


def _divergence(entry: Mapping[str, Any]) -> str:
    spread = entry["divergence_interval"][1] - entry["divergence"]
    digits = ",.0f" if entry["divergence"] >= 1e-5 else ".2g"
    return f"{1e6 * entry['divergence']:{digits}} ± {1e6 * spread:{digits}}"


def _perplexity(measured: Mapping[str, Any]) -> str:
    if "value" in measured:
        return f"{measured['value']:.2f}"
    if not measured:
        return ""
    low, high = measured["interval"]
    if measured["more"] > 1000:
        return f"x {1 + measured['more'] / 100:,.0f} ({1 + low / 100:,.0f} to {1 + high / 100:,.0f})"
    return f"{measured['more']:+.3g} % ({low:+.2g} to {high:+.2g})"


def _bytes(nbytes: Mapping[str, int] | None, plain: Mapping[str, int]) -> str:
    if nbytes is None:
        return ""
    differ = [kind for kind in plain if nbytes[kind] != plain[kind]] or list(plain)
    names = {"weights": "weights", "kv": "KV"}
    return ", ".join(f"{names[kind]} {format_bytes(nbytes[kind])}" for kind in differ)


def _rounded(value: Any) -> Any:
    """Numbers to seven digits: what is beyond is not reproduced on another machine."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def main(files: Sequence[str]) -> None:
    """Write both files."""
    costs = merged([Path(file) for file in files])
    FILE.write_text(json.dumps(costs, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(costs), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
