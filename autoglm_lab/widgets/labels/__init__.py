"""Every word of the dashboard, in English and Chinese: a file a panel. Words in braces are filled in by the browser."""

from __future__ import annotations

from typing import Literal

from autoglm_lab.widgets.labels.budget import BUDGET, EXPORT
from autoglm_lab.widgets.labels.chat import CHAT
from autoglm_lab.widgets.labels.device import DEVICE_BAR, EVENTS, HEADER, LIVE_PLOT
from autoglm_lab.widgets.labels.kv import KV
from autoglm_lab.widgets.labels.modules import MODULES
from autoglm_lab.widgets.labels.plan import PLAN
from autoglm_lab.widgets.labels.shared import SHARED
from autoglm_lab.widgets.labels.training import TRAINING

Lang = Literal["en", "zh"]
LANGS: tuple[Lang, ...] = ("en", "zh")

_PANELS: dict[str, dict[str, tuple[str, str]]] = {
    "header": HEADER,
    "device_bar": DEVICE_BAR,
    "modules_panel": MODULES,
    "kv_panel": KV,
    "budget_panel": BUDGET,
    "plan_panel": PLAN,
    "live_plot": LIVE_PLOT,
    "chat_panel": CHAT,
    "events_panel": EVENTS,
    "export_panel": EXPORT,
    "training_panel": TRAINING,
}


def labels_of(panel: str, lang: str) -> dict[str, str]:
    """The words of one panel in one language.

    Raises:
        ValueError: the language is not one of `LANGS`.
    """
    if lang not in LANGS:
        raise ValueError(f"the dashboard speaks {' and '.join(LANGS)}, not {lang!r}")
    column = LANGS.index(lang)
    return {key: words[column] for key, words in (SHARED | _PANELS.get(panel, {})).items()}
