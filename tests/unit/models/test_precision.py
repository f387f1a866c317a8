"""Which layers a precision swaps, what that makes of a module's bytes, and what cannot be had."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoglm_lab.errors import LoadError, PolicyError
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.loading import adopt, resolve
from autoglm_lab.models.precision import convert, dtype_of, keep_in, label, module_nbytes, precisions_of, spelled_out
from autoglm_lab.models.quantized_linear import QuantizedEmbedding, QuantizedLinear
from autoglm_lab.models.skeleton import model_class, skeleton
from autoglm_lab.models.tensor_sources import PackedTensor
from tests.unit.models.tiny_models import FAMILIES, llama, llava


def sizes(model: nn.Module) -> dict[str, int]:
    return {spec.name: spec.nbytes for spec in anatomy(model)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("precision", ["int8", "int4", "float16"])
def test_the_bytes_that_are_foretold_are_those_of_the_converted_model(family: str, precision: str) -> None:
    model = skeleton(FAMILIES[family](), torch.bfloat16)
    before, foretold = sizes(model), module_nbytes(model, precision)
    assert sizes(model) == before
    # What has no layer to quantise would be refused.
    asked = {name: precision for name in before if foretold[name] < before[name] or precision == "float16"}
    assert {"text"} <= asked.keys()
    convert(model, asked)
    assert sizes(model) == foretold
    assert precisions_of(model) == asked


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_only_the_modules_that_are_named_change(family: str) -> None:
    model = skeleton(FAMILIES[family](), torch.float32)
    before = sizes(model)
    convert(model, {"text": "int4"})
    after = sizes(model)
    assert after["text"] < before["text"]
    assert {name: size for name, size in after.items() if name != "text"} == {
        name: size for name, size in before.items() if name != "text"
    }


def test_linear_layers_are_kept_as_asked_and_embeddings_in_8_bits() -> None:
    model = skeleton(llama(), torch.bfloat16)
    convert(model, {"text": "int4", "head": "int8"})
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert model.model.embed_tokens.form.precision == "int8"
    for layer in model.model.layers:
        assert layer.mlp.down_proj.form.precision == "int4"
    assert model.lm_head.form.precision == "int8"
    assert label(model, "model.layers.0.mlp.down_proj.packed") == ("int4", 64 * 128)
    assert label(model, "model.norm.weight") == ("bfloat16", 64)


def test_a_tied_head_shares_the_codes_of_the_embeddings() -> None:
    model = skeleton(llama(tie_word_embeddings=True), torch.bfloat16)
    made = convert(model, {"text": "int4"})
    assert model.lm_head.packed is model.model.embed_tokens.packed
    assert isinstance(model.lm_head, QuantizedLinear)
    assert [name for name in made.packed if "embed" in name or "head" in name] == ["model.embed_tokens.packed"]


def test_a_layer_of_a_class_of_its_own_stays_as_it_is() -> None:
    model = skeleton(llama(), torch.bfloat16)

    class Doubled(nn.Linear):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(given)

    special = Doubled(64, 64, bias=False, device="meta")
    model.model.layers[0].self_attn.o_proj = special
    convert(model, {"text": "int8"})
    assert model.model.layers[0].self_attn.o_proj is special


def test_sources_become_those_of_packed_weights() -> None:
    resolved = resolve(llava(), weights="dummy", device="cpu")
    old = dict(resolved.sources)
    keep_in(resolved, {"vision": "int8"})
    assert resolved.sources.keys() == {name for spec in anatomy(resolved.model) for name in spec.tensors}
    packed = {name: source for name, source in resolved.sources.items() if isinstance(source, PackedTensor)}
    assert packed
    assert all(source.source is old[source.name] for source in packed.values())
    assert all(".vision_tower." in name for name in packed)


def test_the_text_decides_what_the_model_computes_in() -> None:
    resolved = resolve(llava(), weights="dummy", device="cpu")
    keep_in(resolved, {"text": "bfloat16"})
    assert resolved.dtype == torch.bfloat16
    dtypes = {spec.name: dtype_of(resolved.model, spec) for spec in anatomy(resolved.model)}
    assert dtypes == {
        "vision": torch.float32, "projector": torch.float32, "text": torch.bfloat16, "head": torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["float16", "float32"])
def test_modules_of_different_dtypes_work_together(text: str) -> None:
    torch.manual_seed(0)
    model = model_class(llava())(llava()).eval()
    ids = torch.tensor([[5, *[199] * 16, 7]])
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        convert(model, {"text": text, "vision": "bfloat16", "projector": "float16"})
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                path, _, last = name.rpartition(".")
                setattr(model.get_submodule(path), last, nn.Parameter(empty.copy_(values[name])))
        logits = model(input_ids=ids, pixel_values=pixels).logits
    assert logits.dtype == torch.float32, "the head is as it was"
    torch.testing.assert_close(logits, expected, atol=0.03, rtol=0.1)


def test_a_short_name_stands_for_text_and_head() -> None:
    assert spelled_out("int4", ["vision", "text", "head"]) == {"text": "int4", "head": "int8"}
    assert spelled_out("int8", ["text"]) == {"text": "int8"}
    assert spelled_out({"vision": "int8"}, ["vision"]) == {"vision": "int8"}
    assert spelled_out(None, ["text"]) == {}
    with pytest.raises(PolicyError, match="quantize 'int2' is none of int8, int4, nf4, nor a precision"):
        spelled_out("int2", ["text"])


def test_what_cannot_be_kept_so_is_refused() -> None:
    model = skeleton(llama(), torch.float32)
    with pytest.raises(PolicyError, match="there is no module 'vision': this model has text, head"):
        convert(model, {"vision": "int8"})
    with pytest.raises(PolicyError, match="there is no precision 'int3': use model, float32, bfloat16"):
        convert(model, {"text": "int3"})
    convert(model, {"text": "int8"})
    with pytest.raises(LoadError, match="converted already"):
        convert(model, {"head": "int8"})


def test_an_attached_model_keeps_its_precision() -> None:
    torch.manual_seed(0)
    from transformers import LlamaForCausalLM

    resolved = adopt(LlamaForCausalLM(llama()))
    keep_in(resolved, {})
    with pytest.raises(PolicyError, match=r"a model that is attached keeps the precision .*load\s+the model"):
        keep_in(resolved, {"text": "int8"})
