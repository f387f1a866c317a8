from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import autoglm_lab as lab
from autoglm_lab.models.image_tokens import image_tokens, limit_image_tokens, resized

SCREEN = (1080, 2400)


@pytest.fixture(params=[Glm4vImageProcessorPil, Qwen2VLImageProcessorPil])
def processor(request: pytest.FixtureRequest) -> Any:
    """Families that count an image's pixels for two frames, and for one."""
    return SimpleNamespace(image_processor=request.param())


def encoded(processor: Any, size: tuple[int, int]) -> int:
    """Tokens that the model would really read."""
    given = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
    return int(given["image_grid_thw"].prod()) // processor.image_processor.merge_size**2


@pytest.mark.parametrize("size", [SCREEN, (300, 200), (28, 28), (2400, 300)])
@pytest.mark.parametrize("most", [None, 1219, 286, 16])
def test_it_says_what_is_encoded_and_keeps_the_limit(processor: Any, size: tuple[int, int], most: int | None) -> None:
    free = encoded(processor, size)
    assert limit_image_tokens(processor, most) == ""
    tokens = image_tokens(processor, size)
    assert tokens == encoded(processor, size)
    if most is not None:
        assert tokens <= min(most, free)
        assert tokens > min(most, free) * 0.6


def test_a_limit_that_is_lifted_leaves_the_processor_as_it_came(processor: Any) -> None:
    before, tokens = dict(processor.image_processor.size), image_tokens(processor, SCREEN)
    limit_image_tokens(processor, 100)
    limit_image_tokens(processor, 1000)
    assert image_tokens(processor, SCREEN) != tokens
    limit_image_tokens(processor, None)
    assert {name: processor.image_processor.size[name] for name in ("shortest_edge", "longest_edge")} == {
        name: before[name] for name in ("shortest_edge", "longest_edge")
    }
    assert image_tokens(processor, SCREEN) == tokens


def test_a_plan_may_ask_what_another_limit_would_do(processor: Any) -> None:
    limit_image_tokens(processor, 286)
    kept = image_tokens(processor, SCREEN)
    small = resized(processor, SCREEN, 100)
    assert image_tokens(processor, SCREEN) == kept
    asked = image_tokens(processor, small)
    limit_image_tokens(processor, 100)
    limited = image_tokens(processor, SCREEN)
    assert asked is not None and limited is not None
    assert abs(asked - limited) <= 0.06 * limited
    assert resized(processor, (100, 100), 1000) == (100, 100)


def test_a_model_of_one_image_size_says_so(wb: lab.Workbench) -> None:
    assert image_tokens(wb.processor, SCREEN) == wb.model.config.image_seq_length
    said = limit_image_tokens(wb.processor, 16)
    assert said == f"max_image_tokens does nothing: fixed at {wb.model.config.image_seq_length} an image"
    assert limit_image_tokens(object(), 16) == "max_image_tokens does nothing: this model takes no images"
    assert limit_image_tokens(object(), None) == ""
    assert image_tokens(object(), SCREEN) is None
