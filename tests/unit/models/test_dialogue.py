"""Which models can hold a dialogue, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import autoglm_lab as lab
from autoglm_lab.errors import LoadError
from autoglm_lab.models.dialogue import refuse_unfit
from autoglm_lab.models.skeleton import skeleton
from tests.unit.models.tiny_models import TEXT, llama, omni, whisper


def test_an_encoder_decoder_is_refused_and_stays_as_it_was() -> None:
    model = tf.WhisperForConditionalGeneration(whisper())
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(LoadError, match="WhisperForConditionalGeneration is an encoder-decoder model"):
        lab.attach(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_a_model_without_a_head_is_refused() -> None:
    model = tf.LlamaModel(tf.LlamaConfig(**TEXT))
    with pytest.raises(
        LoadError, match=r"LlamaModel does not read token ids and give logits.*use the class with a head"
    ):
        refuse_unfit(model)


def test_a_model_that_holds_several_names_the_part_that_can_be_used() -> None:
    class Both(tf.PreTrainedModel):
        def __init__(self, config: tf.PreTrainedConfig) -> None:
            super().__init__(config)
            self.thinker = skeleton(config, torch.float32)

        def forward(self, *given: object) -> None:
            raise NotImplementedError

    with pytest.raises(LoadError, match=r"Both does not read token ids.*use its part: model\.thinker"):
        refuse_unfit(Both(omni()))


def test_a_model_on_several_devices_is_refused() -> None:
    model = tf.LlamaForCausalLM(llama())
    model.model.layers[0].to("meta")
    with pytest.raises(LoadError, match="LlamaForCausalLM is spread over cpu, meta: move it to one device first"):
        refuse_unfit(model)
