"""The named models: their sizes, and what was claimed about them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForImageTextToText

from autoglm_lab.errors import LoadError
from autoglm_lab.models import catalog


def parameters(name: str) -> dict[str, int]:
    """Parameters by module, counted on the meta device."""
    config = catalog.preset(name).config()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    counts: Counter[str] = Counter()
    for path, parameter in model.named_parameters():
        counts[path.removeprefix("model.").split(".")[0]] += parameter.numel()
    return dict(counts)


def test_the_embedded_model_fits_twelve_megabytes_in_bfloat16() -> None:
    assert sum(parameters("autoglm-tiny").values()) == 5_934_208
    config = catalog.preset("autoglm-tiny").config()
    assert config.image_seq_length == 49
    assert config.text_config.vocab_size == catalog.TINY_VOCAB_SIZE


def test_the_public_model_has_its_parameters() -> None:
    assert parameters("autoglm-phone-9b") == {
        "visual": 892_498_432,
        "language_model": 8_779_522_048,
        "lm_head": 620_756_992,
    }
    text = catalog.preset("autoglm-phone-9b").config().text_config
    assert text.rope_parameters["mrope_section"] == [8, 12, 12]


def test_the_article_model_computes_to_other_sizes_than_were_claimed() -> None:
    counted = parameters("autoglm-article")
    assert counted["vision_tower"] == 5_623_232
    assert counted["audio_tower"] == 12_480_688
    assert counted["language_model"] == 3_068_291_072
    claims = {claim.subject: claim.nbytes for claim in catalog.preset("autoglm-article").claims}
    assert claims == {
        "text": 6_800_000_000,
        "vision": 2_100_000_000,
        "audio": 1_700_000_000,
        "kv": 3_000_000_000,
        "total": 13_600_000_000,
    }
    assert sum(bytes_ for subject, bytes_ in claims.items() if subject != "total") == claims["total"]
    assert counted["vision_tower"] * 2 < claims["vision"] / 100


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(LoadError, match=r"no preset 'tiny'; presets: autoglm-tiny, autoglm-article, autoglm-phone-9b"):
        catalog.preset("tiny")
    with pytest.raises(LoadError, match="load it from zai-org/AutoGLM-Phone-9B"):
        catalog.preset("autoglm-phone-9b").processor()


def test_the_catalog_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, autoglm_lab.models.catalog; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
