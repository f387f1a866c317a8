"""What of a prompt a cache still holds: never inside a medium, never a bidirectional block that changed."""

from __future__ import annotations

import torch

from autoglm_lab.engine.prompt import MediaRun, Prompt, reusable


def prompt(
    ids: list[int],
    blocks: list[int] | None = None,
    runs: tuple[MediaRun, ...] = (),
    inputs: dict[str, torch.Tensor] | None = None,
) -> Prompt:
    return Prompt(tuple(ids), None if blocks is None else tuple(blocks), runs, inputs or {})


def held(of: Prompt, generated: int = 0) -> tuple[list[int], list[int] | None, tuple[MediaRun, ...]]:
    ids = [*of.ids, *range(900, 900 + generated)]
    return ids, None if of.blocks is None else [*of.blocks, *[-1] * generated], of.runs


def test_a_longer_dialogue_reuses_all_that_was_read() -> None:
    first = prompt([1, 2, 3], [-1, 0, 0])
    second = prompt([1, 2, 3, 900, 901, 5, 6], [-1, 0, 0, -1, -1, 1, 1])
    assert reusable(second, *held(first, generated=2)) == 5


def test_one_token_is_always_left_to_read() -> None:
    same = prompt([1, 2, 3])
    assert reusable(same, *held(same)) == 2


def test_a_block_that_grew_is_read_again_from_its_start() -> None:
    first = prompt([1, 2, 3, 4], [-1, 0, 0, 0])
    second = prompt([1, 2, 3, 4, 5, 6], [-1, 0, 0, 0, 0, -1])
    assert reusable(second, *held(first)) == 1


def test_a_block_that_shrank_is_read_again_from_its_start() -> None:
    first = prompt([1, 2, 3, 4], [-1, 0, 0, 0])
    second = prompt([1, 2, 3, 7, 8], [-1, 0, 0, -1, -1])
    assert reusable(second, *held(first)) == 1


def test_a_prompt_that_is_one_block_again_is_read_whole() -> None:
    same = prompt([1, 2, 3], [0, 0, 0])
    assert reusable(same, *held(same)) == 0


def test_causal_tokens_are_reused_one_by_one() -> None:
    first, second = prompt([1, 2, 3, 4]), prompt([1, 2, 9, 9])
    assert reusable(second, *held(first)) == 2


def image_prompt(digest: str, tail: list[int]) -> Prompt:
    run = MediaRun("image", 1, 3, digest)
    return prompt([1, 7, 7, 7, *tail], None, (run,), {"pixel_values": torch.zeros(1, 3, 2, 2)})


def test_another_picture_with_the_same_tokens_is_not_reused() -> None:
    assert reusable(image_prompt("b", [2, 3]), *held(image_prompt("a", [2, 3]))) == 1
    assert reusable(image_prompt("a", [2, 3, 4]), *held(image_prompt("a", [2, 3]))) == 6


def test_a_picture_taken_out_of_the_history_ends_the_match_there() -> None:
    stripped = prompt([1, 2, 3, 4])
    assert reusable(stripped, *held(image_prompt("a", [2, 3, 4]))) == 1


def test_media_tensors_follow_the_tokens_that_need_them() -> None:
    runs = (MediaRun("image", 1, 2, "a"), MediaRun("image", 5, 2, "b"))
    pixels = torch.arange(2.0).reshape(2, 1)
    whole = prompt([0, 7, 7, 1, 2, 7, 7, 3], None, runs, {"pixel_values": pixels})
    assert whole.inputs_within(0, 8)["pixel_values"].tolist() == [[0.0], [1.0]]
    assert whole.inputs_within(4, 8)["pixel_values"].tolist() == [[1.0]]
    assert whole.inputs_within(7, 8) == {}


def test_media_packed_into_one_tensor_are_read_together() -> None:
    runs = (MediaRun("image", 1, 2, "a"), MediaRun("image", 5, 2, "b"))
    packed = prompt([0, 7, 7, 1, 2, 7, 7, 3, 4], None, runs, {"pixel_values": torch.zeros(8, 3)})
    assert packed.whole() == [(1, 7)]
    assert reusable(packed, *held(packed)) == 8
    assert reusable(packed, packed.ids[:5], None, runs[:1]) == 1


def test_what_depends_on_another_medium_is_read_with_it() -> None:
    runs = (MediaRun("image", 1, 2, "a"), MediaRun("audio", 4, 2, "b"))
    inputs = {"pixel_values": torch.zeros(1, 3), "audio_input_features": torch.zeros(1, 3)}
    both = Prompt((0, 7, 7, 1, 8, 8, 3, 4), None, runs, inputs, together=True)
    assert both.whole() == [(1, 6)]
    assert both.inputs_within(1, 6) == inputs
    assert reusable(both, both.ids[:4], None, runs[:1]) == 1


def test_marks_between_the_tokens_of_an_image_stand_for_no_features() -> None:
    run = MediaRun("image", 4, 6, "a", (0, 1, 3, 4))
    assert run.features == 4
    assert [run.features_before(token) for token in (0, 4, 5, 6, 7, 8, 9, 10, 99)] == [0, 0, 1, 2, 2, 3, 4, 4, 4]
