"""Steps on tiny models of real architectures: chunks, precision of pages, windows, positions of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Glm4vConfig, Glm4vForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.prompt import MediaRun, Prompt
from autoglm_lab.engine.step import Stepper
from autoglm_lab.errors import ContextLimitError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PageFormat, Precision
from autoglm_lab.policy import KvPolicy

IMAGE = 120


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def glm4v() -> Any:
    torch.manual_seed(0)
    config = Glm4vConfig(
        text_config={
            "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 96, "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "temporal_patch_size": 2,
            "spatial_merge_size": 2, "intermediate_size": 48, "out_hidden_size": 64,
        },
        image_token_id=IMAGE, video_token_id=121, image_start_token_id=122, image_end_token_id=123,
        video_start_token_id=124, video_end_token_id=125,
    )  # fmt: skip
    return Glm4vForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


def pool_for(model: Any, precision: Precision = "model") -> KvPool:
    form = PageFormat.of(model.config, model.dtype, precision)
    assert form is not None
    return KvPool(form, open_accelerator("cpu"))


def tokens(count: int, seed: int = 1) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, 110, (count,), generator=generator).tolist())


def pictured(before: int, after: int, *, seed: int = 3, rows: int = 4, columns: int = 6) -> Prompt:
    """A prompt with one image of ``rows`` x ``columns`` patches between some text."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor([[1, rows, columns]])
    count = rows * columns // 4
    text = tokens(before + after, seed)
    ids = (*text[:before], *[IMAGE] * count, *text[before:])
    pixels = torch.randn(rows * columns, 3 * 2 * 14 * 14, generator=generator)
    return Prompt(
        ids, None, (MediaRun("image", before, count, f"picture {seed}"),),
        {"pixel_values": pixels, "image_grid_thw": grid},
    )  # fmt: skip


def stock(model: Any, prompt: Prompt, answer: tuple[int, ...] = ()) -> torch.Tensor:
    """Logits of the plain model after a prompt and the beginning of an answer, read at once."""
    ids = torch.tensor([[*prompt.ids, *answer]])
    extra: dict[str, Any] = dict(prompt.inputs)
    if prompt.runs:
        extra["mm_token_type_ids"] = (ids == IMAGE).int()
        model.model.rope_deltas = None
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits[0, -1].float()


@pytest.mark.parametrize("chunk", [1, 5, 16, 37, 100])
def test_chunks_equal_one_reading(llama: Any, chunk: int) -> None:
    prompt = Prompt(tokens(90), None, ())
    state = KvState(pool_for(llama))
    logits = Stepper(llama).prefill(state, prompt, 0, chunk=chunk)
    torch.testing.assert_close(logits, stock(llama, prompt), atol=1e-5, rtol=1e-4)
    assert state.ids == list(prompt.ids)


@pytest.mark.parametrize("length", [40, 276, 700])
def test_a_long_prompt_behind_a_kept_prefix_equals_one_reading(llama: Any, length: int) -> None:
    stepper, state = Stepper(llama), KvState(pool_for(llama))
    prompt = Prompt(tokens(length), None, ())
    stepper.prefill(state, Prompt(prompt.ids[:20], None, ()), 0)
    logits = stepper.prefill(state, prompt, state.begin(prompt))
    torch.testing.assert_close(logits, stock(llama, prompt), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 9, 1000])
def test_an_image_may_be_cut_by_chunks(glm4v: Any, chunk: int) -> None:
    prompt = pictured(7, 12)
    state, stepper = KvState(pool_for(glm4v)), Stepper(glm4v)
    logits = stepper.prefill(state, prompt, 0, chunk=chunk)
    torch.testing.assert_close(logits, stock(glm4v, prompt), atol=1e-5, rtol=1e-4)
    for step, token in enumerate((5, 9, 60)):
        (logits,) = stepper.decode([state], [token])
        torch.testing.assert_close(logits, stock(glm4v, prompt, (5, 9, 60)[: step + 1]), atol=1e-5, rtol=1e-4)


def test_conversations_with_images_of_one_model_do_not_disturb_each_other(glm4v: Any) -> None:
    pool, stepper = pool_for(glm4v), Stepper(glm4v)
    asked = [pictured(7, 12), pictured(3, 20, seed=4, rows=8, columns=4), Prompt(tokens(15), None, ())]
    states = [KvState(pool) for _ in asked]
    for state, prompt in zip(states, asked, strict=True):
        stepper.prefill(state, prompt, 0, chunk=10)
    answers: list[tuple[int, ...]] = [(), (), ()]
    for step in range(6):
        given = [step + 10 * row + 1 for row in range(3)]
        answers = [(*answer, token) for answer, token in zip(answers, given, strict=True)]
        for prompt, answer, logits in zip(asked, answers, stepper.decode(states, given), strict=True):
            torch.testing.assert_close(logits, stock(glm4v, prompt, answer), atol=1e-5, rtol=1e-4)


def test_a_kept_prefix_with_an_image_is_found_by_the_image_too(glm4v: Any) -> None:
    pool, stepper = pool_for(glm4v), Stepper(glm4v)
    pool.prefixes.obey(KvPolicy())
    first, other = pictured(20, 40), pictured(20, 40, seed=4)
    other = Prompt(first.ids, None, other.runs, other.inputs)  # the same tokens, another picture
    state = KvState(pool)
    stepper.prefill(state, first, 0)
    state.clear()
    for prompt, reused in [(other, 16), (first, 64), (other, 64)]:
        state = KvState(pool)
        start = state.begin(prompt)
        assert start == reused
        logits = stepper.prefill(state, prompt, start)
        torch.testing.assert_close(logits, stock(glm4v, prompt), atol=1e-5, rtol=1e-4)
        (logits,) = stepper.decode([state], [7])
        torch.testing.assert_close(logits, stock(glm4v, prompt, (7,)), atol=1e-5, rtol=1e-4)
        state.clear()


def test_an_image_that_was_read_is_not_read_again(glm4v: Any) -> None:
    pool, stepper = pool_for(glm4v), Stepper(glm4v)
    first = pictured(7, 12)
    state = KvState(pool)
    stepper.prefill(state, first, 0)
    longer = Prompt((*first.ids, *tokens(9, seed=8)), None, first.runs, first.inputs)
    start = state.begin(longer)
    assert start == len(first.ids)
    assert stepper.encoder.missing(longer, start) == set()
    logits = stepper.prefill(state, longer, start)
    torch.testing.assert_close(logits, stock(glm4v, longer), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("precision", "error", "share"), [("int8", 0.03, 0.6), ("int4", 0.4, 0.4)])
def test_quantised_pages_are_smaller_and_close(llama: Any, precision: Precision, error: float, share: float) -> None:
    prompt = Prompt(tokens(90), None, ())
    exact, rounded = (KvState(pool_for(llama, which)) for which in ("model", precision))
    stepper = Stepper(llama)
    wanted = stepper.prefill(exact, prompt, 0)
    logits = stepper.prefill(rounded, prompt, 0)
    assert wanted is not None
    assert logits is not None
    assert 0 < (logits - wanted).abs().max() < error * wanted.abs().max()
    form, plain = rounded.paged.pool.form, exact.paged.pool.form  # type: ignore[union-attr]
    assert form.nbytes <= share / 2 * plain.nbytes, "against float32, which is twice what most models keep"
    again = KvState(rounded.paged.pool)  # type: ignore[union-attr]
    torch.testing.assert_close(stepper.prefill(again, prompt, 0, chunk=11), logits, atol=2e-2, rtol=2e-2)


def test_a_window_keeps_the_first_and_the_latest_tokens(llama: Any) -> None:
    pool, stepper = pool_for(llama), Stepper(llama)
    state = KvState(pool)
    state.window = (64, 16)
    prompt = Prompt(tokens(200), None, ())
    stepper.prefill(state, prompt, 0, chunk=1000)
    assert state.held <= 64
    assert state.forgotten[0] == 16
    assert len(state.ids) == 200
    for token in range(1, 70):
        stepper.decode([state], [token])
        assert state.held <= 64
    assert pool.used_pages <= 4 + 1
    assert len(state.ids) == 269
    follow_up = Prompt((*state.ids, 7, 8, 9), None, ())
    assert state.begin(follow_up) == 269, "what the window forgot counts as read"
    other = Prompt((*state.ids[:100], 3, 3), None, ())
    assert state.begin(other) == 16, "but nothing after it can be kept without it"


def test_a_window_that_holds_everything_changes_nothing(llama: Any) -> None:
    prompt = Prompt(tokens(50), None, ())
    state = KvState(pool_for(llama))
    state.window = (64, 16)
    logits = Stepper(llama).prefill(state, prompt, 0)
    torch.testing.assert_close(logits, stock(llama, prompt), atol=1e-5, rtol=1e-4)


def test_a_piece_beyond_the_window_is_an_error_that_says_so(llama: Any) -> None:
    state = KvState(pool_for(llama))
    state.window = (64, 48)
    state.paged.tokens, state.paged.pages = 64, state.paged.pool.take(4)  # type: ignore[union-attr]
    state.ids = [1] * 64
    with pytest.raises(ContextLimitError, match=r"do not fit a window of 64 tokens beside 48 that stay: raise kv\.max"):
        state.make_room(40)


def test_a_reading_stops_between_two_chunks(llama: Any) -> None:
    prompt = Prompt(tokens(90), None, ())
    state = KvState(pool_for(llama))
    asked: list[int] = []

    def between() -> bool:
        asked.append(len(state.ids))
        return len(asked) < 2

    assert Stepper(llama).prefill(state, prompt, 0, chunk=30, between=between) is None
    assert asked == [30, 60]
    assert state.ids == list(prompt.ids[:60]), "what was read can be used by the next turn"


def test_the_configuration_is_as_before_after_a_step(llama: Any) -> None:
    Stepper(llama).prefill(KvState(pool_for(llama)), Prompt(tokens(20), None, ()), 0)
    assert llama.config._attn_implementation == "sdpa"
