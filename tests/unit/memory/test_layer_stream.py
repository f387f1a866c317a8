from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autoglm_lab.errors import LoadError, ModuleError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.residency.host_rows import HostRows
from autoglm_lab.memory.residency.host_weights import HostWeights
from autoglm_lab.memory.residency.layer_stream import LayerStream
from autoglm_lab.memory.residency.pinned import PinnedBudget
from autoglm_lab.models.checkpoint import FileTensor
from autoglm_lab.models.loading import adopt
from autoglm_lab.models.placement import STAGES, HostPart, host_parts, host_share, saved_by, stage_bytes

IDS = torch.arange(7)[None]


def llama(layers: int = 6, kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


KIB = 1 << 10


def streamed(model: LlamaForCausalLM, saved: int) -> LayerStream:
    sources = adopt(model, None, device=model.device).sources
    stream = LayerStream(model, host_parts(model, saved), sources, open_accelerator("cpu"), PinnedBudget(1 << 30))
    stream.fill()
    return stream


@torch.no_grad()
@pytest.mark.parametrize("saved", [1, 20 * KIB, 50 * KIB, 1 << 30])
def test_layers_on_the_host_compute_what_they_did_on_the_device(saved):
    model = llama()
    expected = model(IDS).logits
    stream = streamed(model, saved)
    for _ in range(3):
        assert torch.equal(model(IDS).logits, expected)
    stream.close()


def kinds(parts: tuple[HostPart, ...]) -> set[str]:
    return {part.path.rsplit(".", 1)[-1] for part in parts}


def test_what_is_saved_costs_as_few_bytes_on_the_bus_as_can_be():
    model = llama(40)
    everything = host_parts(model, 1 << 40)
    assert len(everything) == 80
    assert host_parts(model, 0) == ()
    for saved in range(10 * KIB, saved_by(everything), 100 * KIB):
        parts = host_parts(model, saved)
        passing = sum(part.nbytes for part in parts)
        assert saved <= saved_by(parts) == passing - stage_bytes(parts)
        smallest = min(part.nbytes for part in everything)
        assert passing <= saved + stage_bytes(parts) + smallest
    assert "mlp" in kinds(host_parts(model, 600 * KIB))


def test_products_of_attentions_are_enough_for_little_and_need_the_smallest_stages():
    parts = host_parts(llama(40), 20 * KIB)
    assert kinds(parts) <= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert stage_bytes(parts) == 2 * 2 * KIB
    assert sum(part.nbytes for part in parts) == 24 * KIB


def test_parts_on_the_host_are_spread_evenly_and_in_the_order_of_a_forward():
    parts = host_parts(llama(40, kv_heads=4), 8 * 4 * KIB)
    assert [part.path for part in parts] == [f"model.layers.{4 * number}.self_attn.q_proj" for number in range(10)]


def test_the_device_holds_two_stages_whatever_is_on_the_host():
    stream = streamed(llama(), 1 << 30)
    rows = {(row.name, row.place): row.nbytes for row in stream.holdings()}
    one = rows["text stages", "device"] // STAGES
    assert rows["text layers", "host"] == 12 * one
    stream.close()
    assert list(stream.holdings()) == []


@torch.no_grad()
def test_a_pass_that_fails_half_way_leaves_the_next_one_right():
    model = llama()
    expected = model(IDS).logits
    stream = streamed(model, 60 * KIB)

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    for layer in (1, 3, 4):
        hook = model.model.layers[layer].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(IDS)
        hook.remove()
        stream.settle()
        assert torch.equal(model(IDS).logits, expected)
    stream.close()


def test_a_state_dict_of_layers_that_pass_through_is_refused():
    model = llama()
    stream = streamed(model, 60 * KIB)
    with pytest.raises(
        ModuleError, match=r"of the layers stay on the host: load the model with placement.host_bytes 0"
    ):
        model.state_dict()
    stream.close()


@torch.no_grad()
def test_a_tensor_that_another_layer_shares_stays_where_it_is():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    expected = model(IDS).logits
    parts = {part.path: part for part in host_parts(model, 1 << 30)}
    first, second = (parts[f"model.layers.{number}.mlp"].tensors for number in range(2))
    assert not any(name.endswith("up_proj.weight") for name in (*first, *second))
    stream = streamed(model, 1 << 30)
    assert torch.equal(model(IDS).logits, expected)
    stream.close()


@torch.no_grad()
def test_the_embedding_goes_first_and_is_read_where_it_is():
    model = llama()
    expected = model(IDS).logits
    share = host_share(model, 4 * KIB)
    assert share.rows is not None
    assert share.rows.path == "model.embed_tokens"
    assert (share.parts, share.saved, share.passing) == ((), 64 * 32 * 4, 0)
    sources = adopt(model, None, device=model.device).sources
    rows = HostRows(share.rows, sources, open_accelerator("cpu"), PinnedBudget(0))
    rows.fill()
    assert torch.equal(model(IDS).logits, expected)
    (row,) = rows.holdings()
    assert (row.name, row.place) == ("text embedding", "host")
    rows.close()
    assert list(rows.holdings()) == []


def test_an_embedding_that_the_head_shares_stays_on_the_device():
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    share = host_share(model, 20 * KIB)
    assert share.rows is None
    assert share.saved >= 20 * KIB


def test_all_of_a_share_is_filled_or_nothing():
    model = llama()
    share = host_share(model, 50 * KIB)
    sources = dict(adopt(model, None, device=model.device).sources)
    missing = FileTensor(Path("gone.safetensors"), 0, 8192, torch.float32, (64, 32))
    sources["model.embed_tokens.weight"] = missing
    weights = HostWeights(model, share, sources, open_accelerator("cpu"), PinnedBudget(0))
    with pytest.raises(LoadError):
        weights.fill()
    assert list(weights.holdings()) == []


def test_a_layers_own_list_of_experts_is_not_taken_for_the_layers():
    model = llama(3)
    for layer in model.model.layers:
        layer.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(8))
    paths = [part.path for part in host_parts(model, 1 << 30)]
    assert paths == [f"model.layers.{number}.{part}" for number in range(3) for part in ("self_attn", "mlp")]
