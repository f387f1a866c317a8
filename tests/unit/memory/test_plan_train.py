"""The plan of a training against what training itself holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.engine.prompt import Prompt
from autoglm_lab.errors import LabError
from autoglm_lab.memory.planning.plan_train import TrainingCosts
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.models.decoder_layers import core_of
from autoglm_lab.models.loading import outline
from autoglm_lab.policy import MemoryPolicy, TrainingPolicy
from autoglm_lab.schedule import keepings, recomputed
from autoglm_lab.training.adapters import Adapters
from autoglm_lab.training.examples import Example, Examples
from autoglm_lab.training.finetune import Finetuning
from autoglm_lab.training.layers import Layers
from autoglm_lab.units import GiB, format_bytes

LAYERS, TOKENS, BATCH = 6, 128, 2
# What is live when the forward pass is over, and saved by nothing: the decoder's output.
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def wb() -> Iterator[lab.Workbench]:
    with lab.load("autoglm-tiny", device="cpu") as workbench:
        yield workbench


@pytest.fixture(scope="module")
def costs() -> TrainingCosts:
    return TrainingCosts(outline("autoglm-tiny", device="cpu"), "cpu")


DATA = [
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "<answer>Hi</answer>"}]}
] * 2


@pytest.mark.parametrize(("method", "optimizer"), [("lora", "adamw"), ("lora", "adamw-8bit"), ("full", "adamw")])
def test_what_stands_is_what_the_ledger_shows(wb, monkeypatch, method, optimizer):
    if optimizer == "adamw-8bit":
        pytest.importorskip("torchao")
    seen: list[dict[str, int]] = []
    stored = Finetuning._stored

    def watch(self: Finetuning, gradients: int, states: int) -> None:
        stored(self, gradients, states)
        rows = [*self.holdings(), *self._adapters.holdings()]
        seen.append({row.name: row.nbytes or 0 for row in rows if row.nbytes})

    monkeypatch.setattr(Finetuning, "_stored", watch)
    wb.policy = MemoryPolicy(training={"micro_batch": 2, "accumulation": 1, "optimizer": optimizer})
    wb.finetune(DATA, method=method, rank=4, steps=2, learning_rate=1e-6).result(60)
    wb.tuner.remove()
    plan = lab.plan(wb, finetune=method, tokens=32, rank=4)
    names = ("adapters", "gradients", "optimiser states")
    predicted = {name: plan["train"].of(name) for name in names if plan["train"].of(name)}
    assert {name: seen[-1][name] for name in seen[-1] if name in names} == predicted


@pytest.mark.parametrize("checkpointing", ["none", "every-k", "every-layer"])
def test_what_layers_keep_is_what_autograd_saves(wb, costs, checkpointing):
    adapters = Adapters(wb.model)
    asked = {name: parameter.requires_grad for name, parameter in wb.model.named_parameters()}
    wb.model.requires_grad_(False)
    adapters.add("test", rank=4, alpha=8)
    for parameter in adapters.parameters("test").values():
        parameter.requires_grad_(True)
    core = core_of(wb.model)
    assert core is not None
    layers = Layers(wb.model)
    layers.keepings = keepings(LAYERS, recomputed(LAYERS, checkpointing, 2), 0.0)
    prompt = Prompt(ids=tuple(range(10, 9 + TOKENS)), blocks=(0,) * (TOKENS - 1), runs=())
    example = Example(prompt, (5,), prompt.ids)
    given = Examples(wb.model, wb.processor, None).batch([example] * BATCH, torch.device("cpu"))
    del given["labels"]
    weights = {parameter.untyped_storage().data_ptr() for parameter in wb.model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        at = tensor.untyped_storage().data_ptr()
        if at not in weights:
            saved.setdefault(at, tensor.detach())
        return tensor.detach()  # itself would be a cycle

    with layers.active(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = core[0](**given, use_cache=False, return_dict=True).last_hidden_state
        measured = sum(one.untyped_storage().nbytes() for one in saved.values())
    del hidden, given
    saved.clear()
    adapters.remove()
    for name, parameter in wb.model.named_parameters():
        parameter.requires_grad_(asked[name])
    policy = TrainingPolicy(checkpointing=checkpointing, micro_batch=BATCH)
    step = costs.step(TrainingLoad("lora", TOKENS, 4), policy)
    kept = sum(step.given if one.recompute else step.layer for one in costs.kept(policy))
    assert step.rest + kept == pytest.approx(measured, rel=TOLERANCE)


def test_a_tight_budget_lets_every_layer_be_computed_again(wb):
    load, every = TrainingLoad("lora", TOKENS, 4), recomputed(LAYERS, "every-layer", 1)
    wb.policy = _training(micro_batch=2).replace(budget="100GiB")
    assert wb._recompute(load) == frozenset()
    wb.policy = wb.policy.replace(budget=wb.plan(workload=lab.Workload(training=load))["load"].needed)
    assert wb._recompute(load) == every


def test_training_begins_with_what_the_plan_says(wb, monkeypatch):
    asked: list[TrainingLoad] = []

    def plan(load: TrainingLoad) -> frozenset[int]:
        asked.append(load)
        return recomputed(LAYERS, "every-k", 2)

    monkeypatch.setattr(wb.tuner, "_recompute", plan)
    wb.policy = _training(micro_batch=2, accumulation=1).replace(budget="100GiB")
    result = wb.finetune(DATA, rank=4, steps=1).result(60)
    wb.tuner.remove()
    assert result.settings.startswith("3 of 6 layers")
    assert [(load.method, load.rank) for load in asked] == [("lora", 4)]


def test_stronger_settings_need_less():
    needed = []
    for checkpointing in ("none", "every-k", "every-layer"):
        policy = _training(checkpointing=checkpointing, micro_batch=1)
        plan = lab.plan("autoglm-phone-9b", policy, device="H200", finetune="lora", tokens=2048)
        needed.append(plan["train"].needed)
    assert needed == sorted(set(needed), reverse=True)
    assert [phase.name for phase in plan.phases] == ["load", "train"]


def test_adapters_everywhere_need_more_than_the_few_that_were_measured():
    """Stock training of four layers' adapters took 18.5 GB over the weights: a bound, not a check of accuracy."""
    policy = _training(checkpointing="none", micro_batch=1)
    plan = lab.plan("autoglm-phone-9b", policy, device="H200", finetune="lora", tokens=2048)
    assert 18.5e9 < plan["train"].of("activations") < 24e9


def test_auto_computes_no_more_again_than_the_budget_needs():
    loads = {"finetune": "lora", "device": "H200", "tokens": 2048}
    wide, tight = (
        lab.plan("autoglm-phone-9b", _training(micro_batch=1), budget=budget, **loads)["train"].of("activations")
        for budget in ("100GiB", "22GiB")
    )
    none, every = (
        lab.plan("autoglm-phone-9b", _training(micro_batch=1, checkpointing=one), **loads)["train"].of("activations")
        for one in ("none", "every-layer")
    )
    assert (wide, tight) == (none, every)


def test_the_plan_tells_the_forward_from_the_backward_pass(costs):
    load, policy = TrainingLoad("lora", TOKENS, 4), TrainingPolicy(checkpointing="none", micro_batch=BATCH)
    step, kept = costs.step(load, policy), costs.kept(policy)
    forward, backward = step.passes(kept, moves=False)
    assert forward == step.rest + LAYERS * step.layer + step.loss
    assert backward == step.rest + LAYERS * step.layer + step.backward
    assert step.peak(kept, moves=False) == max(forward, backward)
    plan = lab.plan("autoglm-tiny", MemoryPolicy(training=policy), device="cpu", finetune="lora", tokens=TOKENS, rank=4)
    assert f"activations: {format_bytes(forward)} forward, {format_bytes(backward)} backward" in plan.notes


def test_what_does_not_fit_names_settings_of_training():
    plan = lab.plan("autoglm-phone-9b", device="H200", budget="24GiB", finetune="lora", tokens=2048)
    assert plan.verdict == "fits with changes"
    assert "training.micro_batch=1" in {one.change for one in plan.alternatives if one.fits}
    assert plan.limit == 24 * GiB
    assert plan.to_dict()["workload"]["training"] == {"method": "lora", "tokens": 2048, "rank": 16}


def test_a_load_that_cannot_be_is_named():
    with pytest.raises(LabError, match="use 'lora' or 'full'"):
        lab.plan("autoglm-tiny", device="cpu", finetune="prompt")
    with pytest.raises(LabError, match="at least 2 tokens"):
        lab.plan("autoglm-tiny", device="cpu", finetune="lora", tokens=1)


def _training(**settings: object) -> MemoryPolicy:
    return MemoryPolicy(training=settings)
