"""What the lossy settings of keys and values cost, as measured once: shown beside their switches.

The figures are those of docs/benchmarks.md, "What lossy settings cost", where their intervals are too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

COMMAND = "autoglm-lab bench quality --dialogues 256 --smollm2 FOLDER"
DATE = "2026-11-22"


@dataclass(frozen=True)
class KvCost:
    """One figure with a setting.

    Attributes:
        what: what was measured, in English and Chinese.
        before: right answers without the setting, in %; None: ``after`` is a difference.
        after: right answers with it, in %; or by how much a perplexity is higher, in %.
    """

    what: tuple[str, str]
    before: float | None
    after: float

    def text(self, lang: Literal["en", "zh"] = "en") -> str:
        """The figure for people: ``recall 99.2 → 98.8 %``."""
        what = self.what[lang == "zh"]
        if self.before is None:
            return f"{what} {self.after:+.2g} %"
        return f"{what} {self.before:.1f} → {self.after:.1f} %"


_TAP, _RECALL = ("tap", "点击"), ("recall", "回忆")
_PERPLEXITY = ("SmolLM2 perplexity", "SmolLM2 困惑度")
_RECALL_CUT = ("window of 256 tokens: recall", "256 词元的窗口：回忆")
_PERPLEXITY_CUT = ("window of 512: SmolLM2 perplexity", "512 词元的窗口：SmolLM2 困惑度")

COSTS: dict[str, tuple[KvCost, ...]] = {
    "int8": (KvCost(_TAP, 97.7, 97.7), KvCost(_RECALL, 99.2, 99.2), KvCost(_PERPLEXITY, None, 0.0743)),
    "int4": (KvCost(_TAP, 97.7, 98.0), KvCost(_RECALL, 99.2, 98.8), KvCost(_PERPLEXITY, None, 5.86)),
    "window": (KvCost(_RECALL_CUT, 99.2, 79.3), KvCost(_PERPLEXITY_CUT, None, 3.82)),
}
"""By the value of ``kv.precision`` or ``kv.overflow``. A window costs what it forgets, so a narrower one costs more."""


def cost_of(setting: str, lang: Literal["en", "zh"] = "en") -> str:
    """What a value of ``kv.precision`` or ``kv.overflow`` cost when it was measured; empty where nothing is lost.

    Example:
        >>> cost_of("int4")
        'tap 97.7 → 98.0 %, recall 99.2 → 98.8 %, SmolLM2 perplexity +5.9 %'
    """
    joint = "，" if lang == "zh" else ", "
    return joint.join(cost.text(lang) for cost in COSTS.get(setting, ()))
