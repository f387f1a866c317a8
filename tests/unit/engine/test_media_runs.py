"""Images and sounds found among the tokens of a prompt, and encoder outputs that a forward must not ignore."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from autoglm_lab.engine.encoder import Encoder, UnusedOutputsError
from autoglm_lab.engine.media_runs import MediaRun, media_runs
from autoglm_lab.engine.messages import Message, read_messages
from autoglm_lab.engine.prompt import Prompt
from autoglm_lab.engine.typed_blocks import typed_blocks
from autoglm_lab.errors import MessageError
from autoglm_lab.models.skeleton import skeleton
from tests.unit.models.tiny_models import gemma3, llama

CONFIG = SimpleNamespace(image_token_id=9)


def pictures(*widths: int) -> tuple[Message, ...]:
    parts = [{"type": "image", "image": Image.new("RGB", (width, 10))} for width in widths]
    return read_messages([{"role": "user", "content": parts}])


def spans(runs: tuple[MediaRun, ...]) -> list[tuple[int, int]]:
    return [(run.start, run.length) for run in runs]


def test_an_image_with_marks_between_its_tokens_is_one_run() -> None:
    (run,) = media_runs(CONFIG, None, [1, 9, 9, 5, 9, 9, 6, 2], pictures(10))
    assert (run.start, run.length, run.places) == (1, 5, (0, 1, 3, 4))


def test_the_processor_tells_where_an_image_ends() -> None:
    class Processor:
        def _get_num_multimodal_tokens(self, image_sizes: Any = None) -> dict[str, list[int]]:
            return {"num_image_tokens": [width // 10 for _, width in image_sizes]}

    first, second = media_runs(CONFIG, Processor(), [9, 9, 5, 9, 9, 2, 9], pictures(40, 10))
    assert spans((first, second)) == [(0, 5), (6, 1)]
    assert spans(media_runs(CONFIG, Processor(), [9, 9, 9, 2], pictures(10, 20))) == [(0, 1), (1, 2)]
    assert first.digest != second.digest


def test_images_that_nothing_tells_apart_are_kept_as_one() -> None:
    (run,) = media_runs(CONFIG, None, [1, 9, 9, 5, 9, 2, 9, 3], pictures(10, 20))
    (other,) = media_runs(CONFIG, None, [1, 9, 9, 5, 9, 2, 9, 3], pictures(10, 30))
    assert spans((run,)) == [(1, 6)]
    assert run.digest != other.digest


def test_a_prompt_that_shows_no_image_is_refused() -> None:
    with pytest.raises(MessageError, match=r"the dialogue has 1 image part.* but this model's prompt shows none"):
        media_runs(CONFIG, None, [1, 2], pictures(10))


def test_images_that_see_themselves_are_blocks_where_the_model_says_so() -> None:
    types = [0, 0, 1, 1, 0, 1, 1, 1, 0]
    blocks, given = typed_blocks(skeleton(gemma3(), torch.float32), {"token_type_ids": torch.tensor([types])})
    assert given == {"token_type_ids": tuple(types)}
    assert blocks == (-1, -1, 1, 1, -1, 2, 2, 2, -1)
    assert typed_blocks(skeleton(llama(), torch.float32), {"token_type_ids": torch.tensor([types])}) == (None, {})


def test_outputs_that_a_forward_ignores_are_noticed_and_not_given_again() -> None:
    class Model(torch.nn.Module):
        def get_image_features(self, pixel_values: torch.Tensor) -> None:
            raise NotImplementedError

        def forward(self, mm_encoder_outputs: Any = None) -> None:
            raise NotImplementedError

    encoder, run = Encoder(Model()), MediaRun("image", 1, 2, "a")
    prompt = Prompt((0, 9, 9, 1), None, (run,), {"pixel_values": torch.zeros(1, 3)})
    assert encoder.separate(prompt, 0)
    for read in (lambda given: given.get("image"), lambda given: given["image"], dict, lambda given: given.items()):
        used = encoder.arguments(prompt, {"a": torch.zeros(2, 4)}, 0, 4)
        read(used["mm_encoder_outputs"])
        encoder.check_used(used)
    ignored = encoder.arguments(prompt, {"a": torch.zeros(2, 4)}, 0, 4)
    with pytest.raises(UnusedOutputsError, match="takes no encoder outputs for image"):
        encoder.check_used(ignored)
    assert not encoder.separate(prompt, 0)
