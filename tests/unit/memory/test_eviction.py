"""What is evicted: the tokens that got the least attention, each layer and head for itself; nothing is rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autoglm_lab.errors import ContextLimitError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.kv.eviction import Eviction, chosen, chunk_within
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.observing_cache import ObservingCache
from autoglm_lab.memory.kv.page_format import PageFormat, Precision
from autoglm_lab.memory.kv.paged_attention import decoder_configs, paged
from autoglm_lab.memory.kv.paged_cache import PagedCache
from autoglm_lab.memory.kv.paged_sequence import PagedSequence
from autoglm_lab.policy import KvPolicy

LAYERS, HEADS, WIDTH = 2, 2, 32


def filled(tokens: int, precision: Precision = "model") -> PagedSequence:
    """A conversation with random keys and values."""
    pool = KvPool(PageFormat(LAYERS, HEADS, WIDTH, torch.float32, precision), open_accelerator("cpu"))
    sequence = PagedSequence(pool)
    sequence.reserve(tokens)
    places = torch.arange(tokens)[None]
    pages = torch.tensor(sequence.pages)[places // 16]
    for layer in range(LAYERS):
        pool.store.write(layer, pages, places % 16, *torch.randn(2, 1, tokens, HEADS, WIDTH))
    sequence.tokens = tokens
    return sequence


def contents(sequence: PagedSequence) -> torch.Tensor:
    """``[layers, 2, heads, tokens, width]``."""
    table = torch.tensor([sequence.pages])
    read = [torch.cat(sequence.pool.store.read(layer, table)) for layer in range(LAYERS)]
    return torch.stack(read)[..., : sequence.tokens, :].clone()


def test_the_tokens_with_attention_stay_and_take_their_neighbours_along() -> None:
    scores = torch.zeros(1, 2, 100)
    scores[0, 0, 40], scores[0, 1, 60] = 1.0, 1.0
    scores[..., 5], scores[..., 95] = 9.0, 9.0  # among those that stay anyway
    slots = chosen(scores, 16, 7, 10)
    assert slots[0].tolist() == [list(range(37, 44)), list(range(57, 64))]
    assert chosen(scores, 16, 1, 10)[0].tolist() == [[40], [60]], "it itself before its neighbours"


def test_a_limit_is_split_into_first_chosen_and_latest_tokens() -> None:
    bound = Eviction(tokens=256, sinks=60, observation=32)
    assert bound.split(52) == (64, 105, 35)
    assert bound.split(1) == (64, 120, 40), "a growing answer gets an eighth at once"
    assert bound.split(192) == (64, 0, 0), "the others give way before the first do"
    with pytest.raises(ContextLimitError, match="200 tokens that must be read together do not fit a limit of 256"):
        bound.split(200)


def test_only_a_prompt_that_does_not_fit_is_read_in_smaller_chunks() -> None:
    policy = KvPolicy(overflow="evict", max_tokens=1024, sinks=64, chunk=512)
    assert chunk_within(policy, 1024, 1024) == 512
    assert chunk_within(policy, 1024, 1025) == 240
    assert chunk_within(KvPolicy(overflow="stop", chunk=512), 1024, 4096) == 512


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
def test_each_layer_and_head_keeps_its_own_tokens_bit_for_bit(precision: Precision) -> None:
    sequence = filled(100, precision)
    before = contents(sequence)
    kept = torch.stack([torch.randperm(74)[:20].sort().values + 16 for _ in range(LAYERS * HEADS)])
    kept = kept.view(LAYERS, HEADS, 20)
    sequence.evict(kept, 16, 10)
    assert sequence.tokens == 46
    assert sequence.pool.used_pages == len(sequence.pages) == 3
    after = contents(sequence)
    for layer in range(LAYERS):
        for head in range(HEADS):
            slots = [*range(16), *kept[layer, head].tolist(), *range(90, 100)]
            assert torch.equal(after[layer, :, head], before[layer, :, head, slots])
    assert (sequence.first, sequence.latest) == (16, 36)


def test_pages_that_another_conversation_holds_are_not_written() -> None:
    sequence = filled(96)
    before = contents(sequence)
    other = PagedSequence(sequence.pool)
    sequence.pool.share(sequence.pages[:5])
    other.adopt(sequence.pages[:5])
    slots = torch.arange(50, 80).expand(LAYERS, HEADS, -1)
    sequence.evict(slots, 16, 16)
    assert torch.equal(contents(other), before[..., :80, :])
    assert torch.equal(contents(sequence), before[..., [*range(16), *range(50, 96)], :])
    other.keep(0)
    sequence.keep(0)
    assert sequence.pool.used_pages == 0


def test_no_room_for_other_pages_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = filled(64)
    before, pages = contents(sequence), list(sequence.pages)
    sequence.pool.share(sequence.pages)

    def none(_: int) -> list[int]:
        raise MemoryError

    monkeypatch.setattr(sequence.pool, "take", none)
    with pytest.raises(MemoryError):
        sequence.evict(torch.arange(16, 24).expand(LAYERS, HEADS, -1), 16, 8)
    assert sequence.pages == pages
    assert torch.equal(contents(sequence), before)


def test_a_window_after_an_eviction_knows_which_tokens_are_where() -> None:
    sequence = filled(128)
    sequence.evict(torch.arange(40, 72).expand(LAYERS, HEADS, -1), 32, 32)
    assert (sequence.first, sequence.latest, sequence.tokens) == (32, 64, 96)
    assert sequence.forget(16, 16)
    assert (sequence.first, sequence.latest, sequence.tokens) == (16, 48, 80)
    sequence.keep(16)
    assert sequence.first is None


@pytest.fixture
def llama() -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, head_dim=WIDTH,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


@torch.no_grad()
def test_a_forward_that_looks_sees_what_plain_attention_sees_and_writes_nothing(llama: Any) -> None:
    form = PageFormat.of(llama.config, torch.float32)
    assert form is not None
    sequence = PagedSequence(KvPool(form, open_accelerator("cpu")))
    ids = torch.randint(1, 64, (1, 57))
    configs, cache = decoder_configs(llama), PagedCache([sequence], 50, gathers=False)
    with paged(configs, cache):
        llama(input_ids=ids[:, :50], past_key_values=cache)
    cache.commit()
    before = contents(sequence)
    looking = ObservingCache(sequence, 7)
    with paged(configs, looking):
        logits = llama(
            input_ids=ids[:, 50:], past_key_values=looking, position_ids=torch.arange(50, 57)[None], use_cache=True
        ).logits
    llama.set_attn_implementation("eager")
    plain = llama(input_ids=ids, output_attentions=True)
    torch.testing.assert_close(logits, plain.logits[:, 50:], atol=1e-5, rtol=1e-4)
    weights = torch.stack(plain.attentions)[:, 0, :, 50:, :50]  # [layers, heads, queries, tokens]
    expected = weights.unflatten(1, (HEADS, 2)).mean((2, 3))
    torch.testing.assert_close(looking.scores, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(contents(sequence), before)
    assert sequence.tokens == 50
