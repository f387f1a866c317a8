"""Keys and values in pages: batches equal single runs, memory comes back, a failed step leaves nothing behind."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
from transformers import Glm4Config, Glm4ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import autoglm_lab as lab
from autoglm_lab.engine.kv_state import KvState
from autoglm_lab.engine.prompt import Prompt
from autoglm_lab.engine.step import Stepper
from autoglm_lab.errors import ConversationError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat
from autoglm_lab.policy import KvPolicy
from autoglm_lab.units import MiB

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


@pytest.fixture(params=["llama sdpa", "llama eager", "glm4 sdpa"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    family, attention = request.param.split()
    if family == "llama":
        return LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation=attention).eval()
    return Glm4ForCausalLM._from_config(Glm4Config(**SIZES), attn_implementation=attention).eval()


def pool_for(model: Any) -> KvPool:
    shape = PageFormat.of(model.config, model.dtype)
    assert shape is not None
    return KvPool(shape, open_accelerator("cpu"))


def prompts(lengths: list[int]) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [
        Prompt(tuple(torch.randint(1, 128, (length,), generator=generator).tolist()), None, ()) for length in lengths
    ]


def plain_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].float()


def test_a_batch_of_uneven_lengths_equals_single_runs_of_the_plain_model(model: Any) -> None:
    stepper, pool = Stepper(model), pool_for(model)
    questions = prompts([3, 16, 17, 40])
    states = [KvState(pool) for _ in questions]
    for state, question in zip(states, questions, strict=True):
        logits = stepper.prefill(state, question, 0)
        torch.testing.assert_close(logits, plain_logits(model, list(question.ids)), atol=1e-5, rtol=1e-4)
    for step in range(20):
        tokens = [(7 * step + row) % 120 + 1 for row in range(4)]
        together = stepper.decode(states, tokens)
        for state, question, logits in zip(states, questions, together, strict=True):
            assert len(state.ids) == len(question.ids) + step + 1
            torch.testing.assert_close(logits, plain_logits(model, state.ids), atol=1e-5, rtol=1e-4)


def test_conversations_join_and_leave_a_batch(model: Any) -> None:
    stepper, pool = Stepper(model), pool_for(model)
    states = [KvState(pool) for _ in range(3)]
    for state, question in zip(states, prompts([5, 30, 18]), strict=True):
        stepper.prefill(state, question, 0)
    for members in ([0, 1], [1, 2, 0], [2], [0, 2]):
        for index, logits in zip(members, stepper.decode([states[m] for m in members], members), strict=True):
            torch.testing.assert_close(logits, plain_logits(model, states[index].ids), atol=1e-5, rtol=1e-4)


def test_pages_that_are_returned_serve_the_next_conversation(model: Any) -> None:
    stepper, pool = Stepper(model), pool_for(model)
    first, second = KvState(pool), KvState(pool)
    stepper.prefill(first, prompts([50])[0], 0)
    taken = list(first.paged.pages)
    assert len(taken) == -(-50 // PAGE_TOKENS)
    assert first.nbytes == len(taken) * pool.page_bytes
    first.keep(20)
    assert first.paged.pages == taken[:2]
    stepper.prefill(second, prompts([40])[0], 0)
    assert set(second.paged.pages) & set(taken[2:])
    logits = stepper.decode([first], [9])[0]
    torch.testing.assert_close(logits, plain_logits(model, first.ids), atol=1e-5, rtol=1e-4)


def test_a_step_that_fails_half_way_leaves_nothing_behind(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper, pool = Stepper(model), pool_for(model)
    states = [KvState(pool) for _ in range(2)]
    for state, question in zip(states, prompts([16, 31]), strict=True):
        stepper.prefill(state, question, 0)
    used = pool.used_pages

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr(model.model.layers[1], "forward", fails)
    with pytest.raises(RuntimeError, match="half-way"):
        stepper.decode(states, [1, 2])
    with pytest.raises(RuntimeError, match="half-way"):
        stepper.prefill(states[0], Prompt((*states[0].ids, *range(1, 90)), None, ()), 16)
    monkeypatch.undo()
    assert pool.used_pages == used
    for state, logits in zip(states, stepper.decode(states, [3, 4]), strict=True):
        torch.testing.assert_close(logits, plain_logits(model, state.ids), atol=1e-5, rtol=1e-4)


def ask(stepper: Stepper, state: KvState, ids: list[int]) -> tuple[int, torch.Tensor]:
    question = Prompt(tuple(ids), None, ())
    start = state.begin(question)
    return start, stepper.prefill(state, question, start)


def test_conversations_that_begin_alike_hold_the_same_pages(model: Any) -> None:
    stepper, pool = Stepper(model), pool_for(model)
    (common,) = prompts([40])
    first, second = KvState(pool), KvState(pool)
    ask(stepper, first, [*common.ids, 5, 6, 7])
    start, logits = ask(stepper, second, [*common.ids, 8, 9])
    assert start == 32
    torch.testing.assert_close(logits, plain_logits(model, second.ids), atol=1e-5, rtol=1e-4)
    assert first.paged.pages[:2] == second.paged.pages[:2]
    assert first.own_nbytes + second.own_nbytes == 2 * pool.page_bytes
    (row,) = [row for row in pool.holdings() if row.name == "KV shared prefixes"]
    assert row.nbytes == 2 * pool.page_bytes
    assert pool.used_pages == 4
    first.clear()
    (logits,) = stepper.decode([second], [3])
    torch.testing.assert_close(logits, plain_logits(model, second.ids), atol=1e-5, rtol=1e-4)
    assert second.own_nbytes == second.nbytes
    second.clear()
    assert pool.used_pages == 0
    assert ask(stepper, first, [*common.ids, 5])[0] == 0


def test_a_shared_page_that_is_cut_is_copied_before_it_is_written(model: Any) -> None:
    stepper, pool = Stepper(model), pool_for(model)
    (common,) = prompts([48])
    first, second = KvState(pool), KvState(pool)
    ask(stepper, first, [*common.ids, 5])
    ask(stepper, second, [*common.ids, 6])
    start, logits = ask(stepper, second, [*common.ids[:40], 99, 98, 97])
    assert start == 40
    torch.testing.assert_close(logits, plain_logits(model, second.ids), atol=1e-5, rtol=1e-4)
    (logits,) = stepper.decode([first], [3])
    torch.testing.assert_close(logits, plain_logits(model, first.ids), atol=1e-5, rtol=1e-4)


def test_a_page_that_was_cut_and_written_is_not_found_by_its_old_key(model: Any) -> None:
    stepper, pool = Stepper(model), pool_for(model)
    (common,) = prompts([32])
    first, second = KvState(pool), KvState(pool)
    ask(stepper, first, [*common.ids, 5])
    ask(stepper, first, [*common.ids[:20], *[77] * 20])
    start, logits = ask(stepper, second, [*common.ids, 6])
    assert start == 16
    torch.testing.assert_close(logits, plain_logits(model, second.ids), atol=1e-5, rtol=1e-4)


def test_what_was_cut_off_is_found_again_where_prefixes_are_kept(model: Any) -> None:
    stepper, pool = Stepper(model), pool_for(model)
    pool.prefixes.obey(KvPolicy())
    (common,) = prompts([48])
    state = KvState(pool)
    ask(stepper, state, [*common.ids, 5])
    start, logits = ask(stepper, state, [*common.ids[:20], *[77] * 20])
    assert start == 20
    torch.testing.assert_close(logits, plain_logits(model, state.ids), atol=1e-5, rtol=1e-4)
    start, logits = ask(stepper, state, [*common.ids, 6])
    assert start == 48
    torch.testing.assert_close(logits, plain_logits(model, state.ids), atol=1e-5, rtol=1e-4)
    state.clear()
    assert pool.prefixes.nbytes == pool.used_pages * pool.page_bytes
    pool.prefixes.obey(KvPolicy(reuse=False))
    assert pool.used_pages == 0


def test_a_window_that_forgets_takes_its_pages_out_of_the_store(model: Any) -> None:
    stepper, pool = Stepper(model), pool_for(model)
    pool.prefixes.obey(KvPolicy())
    (question,) = prompts([96])
    state = KvState(pool)
    ask(stepper, state, list(question.ids))
    state.window = (96, 16)
    stepper.decode([state], [3])
    assert state.forgotten == (16, 32)
    assert pool.prefixes.nbytes == 0
    other = KvState(pool)
    start, logits = ask(stepper, other, [*question.ids, 4])
    assert start == 16
    torch.testing.assert_close(logits, plain_logits(model, other.ids), atol=1e-5, rtol=1e-4)


def test_memory_of_a_forgotten_conversation_goes_back_to_the_system() -> None:
    shape = PageFormat(layers=8, kv_heads=8, head_dim=64, dtype=torch.float32)
    pool = KvPool(shape, open_accelerator("cpu"))
    state = KvState(pool)
    state.paged.reserve(8192)
    for layer in range(shape.layers):
        pool.store.codes[state.paged.pages, layer] = 1.0
    process = psutil.Process()

    def anonymous() -> int:
        figures = process.memory_info()
        return figures.rss - figures.shared

    full, nbytes = anonymous(), state.nbytes
    assert nbytes == 8192 * 8 * 2 * 8 * 64 * 4
    state.clear()
    assert full - anonymous() > 0.95 * nbytes
    assert pool.backed == 0


def test_a_pool_over_the_budget_says_so_and_takes_nothing() -> None:
    accelerator = open_accelerator("cpu")
    pool = KvPool(PageFormat(layers=8, kv_heads=8, head_dim=64, dtype=torch.float32), accelerator)
    accelerator.set_budget(accelerator.reading().process)
    with pytest.raises(lab.OutOfMemoryError, match=r"out of memory in KV cache: needed 64\.0 MiB"):
        KvState(pool).paged.reserve(2048)
    assert pool.used_pages == 0


def test_what_torch_only_caches_makes_room_before_a_kept_prefix_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = open_accelerator("cpu")
    pool = KvPool(PageFormat(layers=8, kv_heads=8, head_dim=64, dtype=torch.float32), accelerator)
    room = [0]
    monkeypatch.setattr(accelerator, "headroom", lambda: room[0])
    monkeypatch.setattr(accelerator, "empty_cache", lambda: room.append(room.pop() + 64 * MiB))
    monkeypatch.setattr(pool.prefixes, "free", lambda nbytes: pytest.fail(f"{nbytes} bytes of prefixes went"))
    KvState(pool).paged.reserve(2048)
    assert pool.backed == 64 * MiB


def test_sliding_layers_keep_transformers_own_cache() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    assert PageFormat.of(model.config, model.dtype) is None
    stepper, states = Stepper(model), [KvState(None), KvState(None)]
    for state, question in zip(states, prompts([5, 20]), strict=True):
        stepper.prefill(state, question, 0)
    for _ in range(3):
        for state, logits in zip(states, stepper.decode(states, [3, 4]), strict=True):
            torch.testing.assert_close(logits, plain_logits(model, state.ids), atol=1e-5, rtol=1e-4)


def test_a_cache_that_cannot_be_rolled_back_is_not_decoded_on(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    stepper, state = Stepper(model), KvState(None)
    stepper.prefill(state, prompts([20])[0], 0)

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(model.model.layers[1], "forward", fails)
    with pytest.raises(torch.OutOfMemoryError):
        stepper.decode([state], [3])
    monkeypatch.undo()
    with pytest.raises(ConversationError, match="cannot be taken back to before it: ask again"):
        stepper.decode([state], [3])
