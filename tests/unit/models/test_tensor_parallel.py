"""How a model is cut over several ranks: bytes, refusals, and that the parts together compute what the whole does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from autoglm_lab.errors import LoadError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.residency import weights
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.loading import Resolved, outline, resolve
from autoglm_lab.models.precision import keep_in
from autoglm_lab.models.rank_model import join, take_share
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.models.tensor_parallel import possible_ranks, share_of, shares_nbytes
from autoglm_lab.models.tensor_sources import PackedTensor
from tests.unit.models.tiny_models import glm4v


class Together:
    """Ranks as threads: what each gives waits for the others."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=600)
        self._given: list[Tensor] = [torch.empty(0)] * ranks
        self._here = threading.local()

    def be(self, rank: int) -> None:
        self._here.rank = rank

    def add_up(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._all(tensor)).sum(0)

    def put_together(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._all(tensor), -1)

    def _all(self, tensor: Tensor) -> list[Tensor]:
        self._given[self._here.rank] = tensor.clone()
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found


def llama(**changes: Any) -> PreTrainedConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "tie_word_embeddings": False,
        "attention_bias": True,
    }
    return AutoConfig.for_model("llama", **(sizes | changes))


def embedded() -> Resolved:
    return resolve("autoglm-tiny", dtype="float32", device="cpu")


def made_up_llama() -> Resolved:
    return resolve(llama(), weights="dummy", dtype="float32", device="cpu")


def made_up_phone() -> Resolved:
    return resolve(glm4v(), weights="dummy", dtype="float32", device="cpu")


def logits(resolved: Resolved, ids: Tensor) -> Tensor:
    residency = Residency(resolved, open_accelerator("cpu"))
    residency.materialise()
    with torch.no_grad():
        result: Tensor = resolved.model(input_ids=ids).logits
    residency.close()
    return result


def logits_of_ranks(make: Callable[[], Resolved], ranks: int, ids: Tensor) -> list[Tensor]:
    group, results = Together(ranks), [torch.empty(0)] * ranks
    parts = [make() for _ in range(ranks)]
    for rank, part in enumerate(parts):
        share = take_share(part, ranks, rank)
        join(part.model, share, group)

    def run(rank: int) -> None:
        group.be(rank)
        results[rank] = logits(parts[rank], ids)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    ("make", "ranks"),
    [(embedded, 2), (made_up_llama, 4), (made_up_phone, 2)],
    ids=["embedded", "llama with biases", "the phone model's architecture"],
)
def test_every_rank_computes_the_logits_of_the_whole_model(make: Callable[[], Resolved], ranks: int) -> None:
    ids = torch.tensor([[30, 41, 52, 63, 74, 85, 31, 42]])
    whole = logits(make(), ids)
    for result in logits_of_ranks(make, ranks, ids):
        assert result.shape == whole.shape
        assert torch.allclose(result, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("layer", "rows", "columns"), [("gate_up_proj", 512, 256), ("down_proj", 256, 256)])
def test_four_bits_whose_groups_are_not_cut_are_those_of_the_whole_model(layer: str, rows: int, columns: int) -> None:
    def decoded(resolved: Resolved) -> Tensor:
        keep_in(resolved, {"text": "int4"})
        source = resolved.sources[f"model.language_model.layers.0.mlp.{layer}.packed"]
        assert isinstance(source, PackedTensor)
        packed = torch.empty(source.form.nbytes, dtype=torch.uint8)
        weights.fill(packed, source, lambda _: None)
        return source.form.decode(packed, 0, source.form.rows, torch.float32)

    part = embedded()
    take_share(part, 2, 1)
    whole, own = decoded(embedded()), decoded(part)
    assert own.shape == (rows, columns)
    expected = torch.cat([whole[256:512], whole[768:]]) if layer == "gate_up_proj" else whole[:, 256:]
    assert torch.equal(own, expected)


def test_two_ranks_hold_half_of_the_text_and_only_the_first_the_encoders() -> None:
    model = outline("autoglm-phone-9b").model
    whole = shares_nbytes_of_one(model)
    first, second = shares_nbytes(model, 2)
    assert set(first) == {"vision", "text", "head"}
    assert set(second) == {"text", "head"}
    assert first["vision"] == whole["vision"]
    assert first["text"] == second["text"]
    assert first["head"] == whole["head"] // 2
    # Norms and biases of sums are whole on both, some 1.3 MB; everything else is halved.
    assert 0 < 2 * first["text"] - whole["text"] < 2_000_000


def test_the_bytes_that_are_told_are_those_of_the_parameters() -> None:
    for rank in (0, 3):
        part = resolve("autoglm-tiny", dtype="bfloat16", device="cpu")
        told = shares_nbytes(part.model, 4)
        take_share(part, 4, rank)
        text = shares_nbytes_of_one(part.model)["text"]
        assert told[rank]["text"] == text


def test_heads_of_keys_and_values_are_kept_twice_where_there_are_fewer_than_ranks() -> None:
    model = outline("autoglm-phone-9b").model
    assert share_of(model, 2, 0).kv_heads == 1
    assert share_of(model, 2, 0).note == ""
    four = [share_of(model, 4, rank) for rank in range(4)]
    assert {share.kv_heads for share in four} == {1}
    assert four[0].note == "2 heads of keys and values over 4 ranks: each is computed and kept by 2"
    spans = [
        next(layer for layer in share.layers if layer.path.endswith("layers.0.self_attn.k_proj")).cuts["weight"].rows
        for share in four
    ]
    assert spans == [((0, 128),), ((0, 128),), ((128, 256),), ((128, 256),)]


def test_a_number_of_ranks_that_does_not_divide_the_model_names_those_that_do() -> None:
    model = outline("autoglm-tiny").model
    assert possible_ranks(model) == (2, 4, 8)
    with pytest.raises(
        LoadError, match=r"q_proj has 8 heads, which 3 ranks cannot share evenly; ranks that can: 2, 4, 8"
    ):
        share_of(model, 3, 0)


def test_a_model_without_a_plan_is_refused() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(LoadError, match="transformers has no plan for its attention"):
        share_of(skeleton(config, torch.float32), 2, 0)


def test_a_rank_keeps_its_heads_in_its_pages_and_so_does_every_skeleton_of_it() -> None:
    part = embedded()
    whole = PageFormat.of(part.config, part.dtype)
    take_share(part, 2, 1)
    form = PageFormat.of(part.config, part.dtype)
    assert whole is not None
    assert form is not None
    assert (whole.kv_heads, form.kv_heads, form.head_dim) == (2, 1, whole.head_dim)
    again = {name: one.shape for name, one in skeleton(part.config, torch.float32).named_parameters()}
    assert again == {name: one.shape for name, one in part.model.named_parameters()}


def shares_nbytes_of_one(model: Any) -> dict[str, int]:
    return {spec.name: spec.nbytes for spec in anatomy(model)}
