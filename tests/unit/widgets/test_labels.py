from __future__ import annotations

import re
from typing import get_args

import pytest

import autoglm_lab.widgets.dashboard  # noqa: F401 -- defines every panel
from autoglm_lab.memory.events import EventKind
from autoglm_lab.memory.kv.page_format import Precision
from autoglm_lab.policy import KvPolicy, Overflow
from autoglm_lab.widgets.labels import LANGS, labels_of
from autoglm_lab.widgets.panel import Panel

SETTINGS = {
    "overflow": get_args(Overflow),
    "precision": get_args(Precision),
    "place": get_args(KvPolicy.model_fields["place"].annotation),
}
PANELS = {panel.name: panel for panel in Panel.__subclasses__()}


@pytest.mark.parametrize("panel", PANELS)
def test_every_word_that_a_panel_uses_exists_in_both_languages(panel):
    source = str(PANELS[panel]._esm)
    used = set(re.findall(r'\bt\("([^"]+)"', source))
    assert used
    for lang in LANGS:
        assert used <= set(labels_of(panel, lang)), f"{lang} lacks {sorted(used - set(labels_of(panel, lang)))}"


@pytest.mark.parametrize("panel", PANELS)
def test_both_languages_fill_in_the_same_values_and_none_is_forgotten(panel):
    english, chinese = labels_of(panel, "en"), labels_of(panel, "zh")
    assert english.keys() == chinese.keys()
    for key in english:
        assert re.findall(r"{\w+}", english[key]) == sorted(re.findall(r"{\w+}", chinese[key])) or set(
            re.findall(r"{\w+}", english[key])
        ) == set(re.findall(r"{\w+}", chinese[key])), key
        assert bool(english[key]) == bool(chinese[key]), key


def test_words_made_up_at_run_time_exist_too():
    made = {
        "header": ["phase load", "phase encode", "phase prefill", "phase decode", "phase train", "phase idle"],
        "modules_panel": [
            *(f"on {place}" for place in ("device", "host", "disk")),
            *(f"residency {residency}" for residency in ("keep", "on-demand", "off")),
            *(f"cost {precision}" for precision in ("int8", "int4")),
        ],
        "kv_panel": [
            f"{setting} {value}{hint}"
            for setting, values in SETTINGS.items()
            for value in values
            for hint in ("", " hint")
        ],
        "events_panel": [f"event {kind}" for kind in get_args(EventKind)],
        "live_plot": [f"event {kind}" for kind in get_args(EventKind)],
        "device_bar": ["source nvml", "source psutil", "beside host", "beside disk"],
    }
    for panel, keys in made.items():
        assert set(keys) <= labels_of(panel, "en").keys()


def test_another_language_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="speaks en and zh, not 'fr'"):
        labels_of("header", "fr")
