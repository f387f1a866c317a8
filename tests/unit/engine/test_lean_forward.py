"""Stand-ins for layers: the same numbers, for steps alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from autoglm_lab.engine.lean_forward import LeanForward


def llama(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384, hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def stood_in_for(model: LlamaForCausalLM) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch came without oneDNN")
@pytest.mark.parametrize("tokens", [1, 7, 8, 100])
def test_onednn_multiplies_as_the_layer_does(tokens: int) -> None:
    model = llama(torch.float32)
    lean, given = LeanForward(model), torch.randn(1, tokens, 576)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        expected = layer(given)
        with lean.active():
            assert {f"model.layers.0.self_attn.{name}_proj" for name in "qo"} <= stood_in_for(model)
            assert not {"lm_head", "model.layers.0.self_attn.k_proj"} & stood_in_for(model)
            torch.testing.assert_close(layer(given), expected, rtol=1e-5, atol=1e-5)
    assert stood_in_for(model) == set()


def test_a_layer_in_half_precision_multiplies_itself() -> None:
    model = llama(torch.bfloat16)
    with LeanForward(model).active():
        assert stood_in_for(model) == {"model.layers.0.mlp"}


def test_a_layer_that_someone_else_stands_in_for_is_left_to_them() -> None:
    model = llama(torch.float32)
    layer: nn.Module = model.model.layers[0].self_attn.q_proj
    theirs = layer.forward
    layer.__dict__["forward"] = theirs
    with LeanForward(model).active():
        assert layer.__dict__["forward"] is theirs
    assert layer.__dict__["forward"] is theirs
