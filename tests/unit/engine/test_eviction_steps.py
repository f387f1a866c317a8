"""A conversation beyond its limit that keeps what the last words attend to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import autoglm_lab as lab
from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.overflow import check_overflow
from autoglm_lab.engine.positions import Places
from autoglm_lab.engine.prompt import MediaRun, Prompt
from autoglm_lab.engine.question import Question
from autoglm_lab.engine.step import Stepper
from autoglm_lab.errors import ContextLimitError, PolicyError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.kv.eviction import Eviction
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PageFormat, Precision
from autoglm_lab.policy import KvPolicy

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0,
}  # fmt: skip
BOUND = Eviction(tokens=96, sinks=16, observation=8)


@pytest.fixture
def llama() -> Any:
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="sdpa").eval()


def pool_for(model: Any, precision: Precision = "model") -> KvPool:
    form = PageFormat.of(model.config, model.dtype, precision)
    assert form is not None
    return KvPool(form, open_accelerator("cpu"))


def prompt(count: int) -> Prompt:
    return Prompt(tuple(torch.randint(1, 128, (count,)).tolist()), None, ())


def bounded(pool: KvPool, bound: Eviction = BOUND) -> KvState:
    state = KvState(pool)
    state.eviction = bound
    return state


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
def test_a_prompt_beyond_the_limit_is_read_and_answered_within_it(llama: Any, precision: Precision) -> None:
    pool, stepper = pool_for(llama, precision), Stepper(llama)
    state = bounded(pool)
    most = []
    stepper.prefill(state, prompt(300), 0, between=lambda: bool(most.append(pool.used_pages)) or True)
    for token in range(1, 40):
        (logits,) = stepper.decode([state], [token])
        most.append(pool.used_pages)
        assert torch.isfinite(logits).all()
    assert max(most) <= 96 // 16
    assert state.held <= 96
    assert len(state.ids) == 339


def test_an_answer_that_fits_is_as_without_a_limit_bit_for_bit(llama: Any) -> None:
    stepper, asked = Stepper(llama), prompt(80)
    free, limited = KvState(pool_for(llama)), bounded(pool_for(llama))
    logits = [stepper.prefill(state, asked, 0, chunk=64) for state in (free, limited)]
    for token in range(1, 17):
        assert torch.equal(logits[0], logits[1])  # type: ignore[arg-type]
        logits = [stepper.decode([state], [token])[0] for state in (free, limited)]
    assert limited.held == 96
    assert limited.forgotten == (0, 0)
    stepper.decode([limited], [17])
    assert limited.held == 96 - 96 // 8 + 1


def test_what_is_forgotten_is_what_the_last_words_attend_to_least(llama: Any) -> None:
    stepper, state = Stepper(llama), bounded(pool_for(llama))
    stepper.prefill(state, prompt(96), 0)
    scores = stepper._observed(state)
    keys = [state.paged.pool.store.read(layer, torch.tensor([state.paged.pages]))[0][0].clone() for layer in range(3)]
    stepper.make_room(state, 30)
    assert state.held == 66
    for layer in range(3):
        left = state.paged.pool.store.read(layer, torch.tensor([state.paged.pages]))[0][0][:, :66]
        for head in range(2):
            best = 16 + int(scores[layer, head, 16:84].argmax())
            assert (left[head] == keys[layer][head, best]).all(-1).any()
            assert torch.equal(left[head, :16], keys[layer][head, :16])
            assert torch.equal(left[head, -12:], keys[layer][head, 84:96])


def test_a_batch_evicts_as_each_alone_does(llama: Any) -> None:
    stepper, asked = Stepper(llama), [prompt(90), prompt(300), prompt(20)]
    pool = pool_for(llama)
    together, alone = ([bounded(pool) for _ in asked] for _ in range(2))
    for states in (together, alone):
        for state, one in zip(states, asked, strict=True):
            stepper.prefill(state, one, 0)
    for token in range(1, 30):
        batch = stepper.decode(together, [token] * 3)
        single = [stepper.decode([state], [token])[0] for state in alone]
        torch.testing.assert_close(torch.stack(batch), torch.stack(single), atol=1e-4, rtol=1e-3)
    assert [state.held for state in together] == [state.held for state in alone]


def test_an_evicted_conversation_goes_on_but_is_no_prefix_for_others(llama: Any) -> None:
    pool, stepper = pool_for(llama), Stepper(llama)
    pool.prefixes.obey(KvPolicy())
    state, asked = bounded(pool), prompt(96)
    stepper.prefill(state, asked, 0)
    stepper.decode([state], [5])
    first, last = state.forgotten
    assert (first, last) == (16, 96 - 17), "of 96, 12 make room and 16 are the first: the latest are a quarter of 68"
    state.publish()
    other = KvState(pool)
    assert other.begin(Prompt((*asked.ids, 9), None, ())) == 16
    assert state.begin(Prompt((*state.ids, 7, 8), None, ())) == 97, "what it forgot counts as read"
    assert state.begin(Prompt((*state.ids[:40], 7, 8), None, ())) == 16
    assert state.forgotten == (0, 0)
    assert state.held == 16


def test_a_step_that_fails_between_two_layers_leaves_nothing_behind(llama: Any, monkeypatch: Any) -> None:
    pool, stepper = pool_for(llama), Stepper(llama)
    state, asked = bounded(pool), prompt(300)
    move = pool.store.move

    def fail_once(layer: int, *places: Any) -> None:
        if layer == 2:
            monkeypatch.undo()
            raise torch.OutOfMemoryError("made up")
        move(layer, *places)

    monkeypatch.setattr(pool.store, "move", fail_once)
    with pytest.raises(torch.OutOfMemoryError):
        stepper.prefill(state, asked, 0)
    assert state.held == len(state.ids) == pool.used_pages == 0
    again, fresh = stepper.prefill(state, asked, 50), stepper.prefill(bounded(pool), asked, 0)
    assert torch.equal(again, fresh)  # type: ignore[arg-type]
    assert len(state.ids) == 300


def test_images_ask_nothing_and_words_stand_where_they_stood() -> None:
    asked = Prompt(tuple(range(20)), None, (MediaRun("image", 10, 6, "digest"),))
    places = torch.arange(20).expand(3, 1, -1) * 2
    question = Question.of(asked, Places(places, 20), 6)
    assert question.ids == (8, 9, 16, 17, 18, 19)
    assert question.positions[0, 0].tolist() == [16, 18, 32, 34, 36, 38]
    later = question.then([*range(20), 70, 71], 20, 6)
    assert later.ids == (16, 17, 18, 19, 70, 71)
    assert later.positions[2, 0].tolist() == [32, 34, 36, 38, 40, 41]
    assert question.then(list(range(15)), 20, 6) is question, "some of the prompt is still to be read"


def test_a_piece_that_does_not_fit_is_an_error_that_says_so(llama: Any) -> None:
    stepper, state = Stepper(llama), bounded(pool_for(llama), Eviction(64, 48, 8))
    whole = Prompt(prompt(100).ids, (*[-1] * 40, *[0] * 50, *[-1] * 10), ())
    with pytest.raises(ContextLimitError, match="50 tokens that must be read together do not fit a limit of 64 tokens"):
        stepper.prefill(state, whole, 0)


def test_a_model_whose_attention_nobody_sees_refuses_to_evict() -> None:
    sliding = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
    with pytest.raises(PolicyError, match=r"kv\.overflow is 'evict', but this model's layers do not lie in pages"):
        check_overflow(KvPolicy(overflow="evict"), sliding)
    eager = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="eager")
    with pytest.raises(PolicyError, match="this model computes its attention itself"):
        check_overflow(KvPolicy(overflow="evict"), eager)
    check_overflow(KvPolicy(overflow="window"), eager)


SMALL_TALK = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am AutoGLM-Tiny."}]
DIALOGUE = [
    *SMALL_TALK * 3,
    {"role": "user", "content": "Remember that the code of the safe is 5038"},
    {"role": "assistant", "content": "OK, noted."},
    *SMALL_TALK * 12,
    {"role": "user", "content": "What is the code of the safe?"},
]


def test_a_code_told_in_the_middle_survives_where_a_window_has_lost_it(wb: lab.Workbench) -> None:
    texts = {}
    for overflow in ("window", "evict"):
        wb.policy = lab.MemoryPolicy(kv={"overflow": overflow, "max_tokens": 128, "sinks": 16, "reuse": False})
        answer = wb.engine.submit(DIALOGUE, conversation="code", replace=True).result(60)
        assert answer.usage.prompt_tokens > 2 * 128
        assert answer.kv_bytes <= 8 * wb.engine.state.pool.page_bytes  # type: ignore[union-attr]
        texts[overflow] = answer.text
    assert texts == {"window": "You have not told me that code.", "evict": "The code is 5038."}


def test_a_turn_in_fewer_bits_stays_within_its_bytes(wb: lab.Workbench) -> None:
    wb.policy = lab.MemoryPolicy(kv={"overflow": "evict", "sinks": 32, "precision": "int8"})
    limit = 12 * wb.engine.state.pool.page_bytes  # type: ignore[union-attr]
    wb.policy = wb.policy.replace(kv={"max_bytes": limit})
    answer = wb.engine.submit(DIALOGUE, replace=True, max_new_tokens=40, min_new_tokens=40).result(60)
    assert answer.usage.completion_tokens == 40
    assert limit // 2 < answer.kv_bytes <= limit
    assert wb.memory.of_kind("kv") - wb.memory.nbytes("KV kept prefixes") <= limit
