"""Sample screens and sounds that go with the embedded model, each with a question and its answer.

Made by `python -m recipes.tiny.make_samples` from looks and tone lengths that the model was not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

_FOLDER: Final = Path(__file__).parent


@dataclass(frozen=True)
class Sample:
    """Files, a question about them, and what a right answer is.

    Attributes:
        name: its key.
        title: a few words, by language ("en", "zh").
        prompt: the question, by language.
        answer: the model's wording of the right answer to the English question; a tap may land anywhere in `area`.
        image: a 224x224 PNG, or None.
        audio: a 16 kHz mono WAV, or None.
        area: what a tap must hit, (x0, y0, x1, y1) in thousandths of the screen (0 to 999), or None.
    """

    name: str
    title: Mapping[str, str]
    prompt: Mapping[str, str]
    answer: str
    image: Path | None = None
    audio: Path | None = None
    area: tuple[int, int, int, int] | None = None


def _words(en: str, zh: str) -> Mapping[str, str]:
    return MappingProxyType({"en": en, "zh": zh})


SAMPLES: Final[tuple[Sample, ...]] = (
    Sample(
        "home",
        _words("Home screen", "主屏幕"),
        _words("Tap the red circle", "点击红色圆形"),
        'do(action="Tap", element=[466,744])',
        image=_FOLDER / "home.png",
        area=(385, 663, 547, 824),
    ),
    Sample(
        "icons",
        _words("Icons to count", "数图标"),
        _words("How many blue icons are there?", "有几个蓝色图标？"),
        "I see 3.",
        image=_FOLDER / "icons.png",
    ),
    Sample(
        "number",
        _words("A dialled number", "拨号音"),
        _words("Type the digits you hear.", "输入你听到的数字"),
        'do(action="Type", text="4079")',
        audio=_FOLDER / "number.wav",
    ),
    Sample(
        "key",
        _words("Keypad and a tone", "键盘和按键音"),
        _words("Tap the key you hear.", "点击你听到的按键"),
        'do(action="Tap", element=[435,672])',
        image=_FOLDER / "keypad.png",
        audio=_FOLDER / "key.wav",
        area=(340, 582, 529, 762),
    ),
    Sample(
        "busy",
        _words("A phone tone", "电话音"),
        _words("What do you hear?", "你听到了什么？"),
        "I hear a busy tone.",
        audio=_FOLDER / "busy.wav",
    ),
)
"""In the order in which they are offered."""
