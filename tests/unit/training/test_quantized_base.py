"""Adapters that learn on weights which are kept in 4 or 8 bits (QLoRA)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import autoglm_lab as lab
from autoglm_lab.errors import TrainingError
from autoglm_lab.memory.planning.plan_train import TrainingCosts
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.models import quantized_products
from autoglm_lab.models.chunked_loss import next_token_loss
from autoglm_lab.models.decoder_layers import core_of
from autoglm_lab.models.loading import outline
from autoglm_lab.models.precision import convert
from autoglm_lab.models.quantized_linear import QuantizedLinear
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.models.weight_format import WeightFormat
from autoglm_lab.policy import TrainingPolicy
from autoglm_lab.training.dataset import Dataset

WAIT = 60


@pytest.fixture(scope="module")
def nf4() -> Iterator[lab.Workbench]:
    torch.set_num_threads(1)
    with lab.load("autoglm-tiny", device="cpu", quantize="nf4") as workbench:
        workbench.policy = workbench.policy.replace(training={"micro_batch": 2, "accumulation": 1})
        yield workbench


def test_adapters_learn_on_nf4_and_no_weight_is_ever_decoded_as_a_whole(
    nf4: lab.Workbench, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [one for one in nf4.model.modules() if isinstance(one, QuantizedLinear)]
    assert {one.form.precision for one in layers} == {"nf4", "int8"}  # the head shares the embedding's table
    codes = [one.packed.clone() for one in layers]

    decoded, slices = WeightFormat.decode, []

    def counted(form: WeightFormat, packed: torch.Tensor, first: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        slices.append(end - first)
        return decoded(form, packed, first, end, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(WeightFormat, "decode", counted)
        patch.setattr(quantized_products, "SLICE_BYTES", 4 * 256 * 32)  # 32 rows of 256 columns
        run = nf4.finetune(data, steps=8, rank=4, alpha=8.0, learning_rate=5e-3, warm_up=1)
        run.result(WAIT)
    assert run.losses[-1][1] < 0.6 * run.losses[0][1]
    assert max(slices) == 32
    assert all(torch.equal(one.packed, before) for one, before in zip(layers, codes, strict=True))
    with pytest.raises(TrainingError, match="cannot be merged into weights kept in nf4: they would be rounded"):
        nf4.tuner.merge()
    assert nf4.tuner.adapters == ("default",)
    nf4.tuner.remove()


def test_layers_computed_again_learn_the_same_on_nf4(nf4: lab.Workbench, data: Dataset) -> None:
    losses = {}
    for checkpointing in ("none", "every-layer"):
        nf4.policy = nf4.policy.replace(training={"checkpointing": checkpointing})
        run = nf4.finetune(data, steps=2, rank=4, alpha=8.0, learning_rate=5e-3, warm_up=1)
        run.result(WAIT)
        losses[checkpointing] = [loss for _, loss in run.losses]
        nf4.tuner.remove()
    assert losses["none"] == pytest.approx(losses["every-layer"], rel=1e-5)


def test_weights_that_cannot_learn_themselves_are_named(nf4: lab.Workbench, data: Dataset) -> None:
    said = "the weights of 'text' are kept in nf4 and cannot learn themselves: learn adapters on them"
    with pytest.raises(TrainingError, match=said):
        nf4.finetune(data, method="full", steps=1).result(WAIT)
    with pytest.raises(TrainingError, match=said):
        lab.plan("autoglm-tiny", device="cpu", quantize="nf4", finetune="full", tokens=64)


def test_a_quantised_head_gives_the_loss_and_gradient_of_its_decoded_weight(nf4: lab.Workbench) -> None:
    core = core_of(nf4.model)
    assert core is not None
    head = core[1]
    assert isinstance(head, QuantizedLinear)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 9, head.in_features, generator=generator).requires_grad_(True)
    again = given.detach().clone().requires_grad_(True)
    labels = torch.randint(0, head.out_features, (2, 9), generator=generator)
    with torch.enable_grad():
        loss = next_token_loss(given, labels, head, chunk=4, count=16)
        logits = functional.linear(again[:, :-1].flatten(0, 1), head.weight)
        expected = functional.cross_entropy(logits, labels[:, 1:].flatten())
        loss.backward()
        expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(given.grad, again.grad)


def test_a_step_on_a_gpu_needs_no_more_than_a_slice_beyond_what_it_does_on_whole_weights() -> None:
    load, policy = TrainingLoad("lora", 512, 16), TrainingPolicy(micro_batch=1)
    shapes = outline("autoglm-phone-9b", device="cpu")
    model = skeleton(shapes.model.config, shapes.dtype)
    convert(model, {"text": "nf4", "head": "int8"})
    whole, rounded = (TrainingCosts(one, "cuda").step(load, policy) for one in (shapes, replace(shapes, model=model)))
    assert rounded.layer == whole.layer
    assert 0 < rounded.backward - whole.backward <= 64 << 20


def test_the_phone_models_adapters_train_on_nf4_below_12_gib() -> None:
    asked = {"finetune": "lora", "tokens": 2048, "budget": "12GiB", "device": "H200"}
    policy = lab.MemoryPolicy(training={"micro_batch": 1, "accumulation": 16})
    plan = lab.plan("autoglm-phone-9b", policy, quantize="nf4", **asked)  # type: ignore[arg-type]
    assert plan.verdict == "fits"
    assert plan["train"].of("text") < 5 << 30  # 16 GiB in bfloat16
