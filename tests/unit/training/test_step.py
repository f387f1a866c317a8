from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.models.decoder_layers import decoder_layers
from autoglm_lab.schedule import keepings, recomputed, spread
from autoglm_lab.training.adapters import Adapters
from autoglm_lab.training.dataset import Dataset
from autoglm_lab.training.examples import Example, Examples
from autoglm_lab.training.feature_cache import FeatureCache
from autoglm_lab.training.layers import Layers
from autoglm_lab.training.settings import StepSettings
from autoglm_lab.training.step import Step

PLAIN = StepSettings(layers=6, micro_batch=6)


class Setup:
    """The embedded model with an adapter whose weights are not zero, and examples for it."""

    def __init__(self, wb: lab.Workbench, data: Dataset) -> None:
        self.model, self.adapters = wb.model, Adapters(wb.model)
        self.adapters.add("test", rank=4, alpha=8)
        self.weights = self.adapters.parameters("test")
        generator = torch.Generator().manual_seed(3)
        for weight in self.weights.values():
            weight.requires_grad_(True)
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
        self.maker = Examples(wb.model, wb.processor, FeatureCache(torch.device("cpu")))
        self.examples: list[Example] = [self.maker.example(messages) for messages in data]

    def step(self, settings: StepSettings) -> Step:
        return Step(self.model, self.maker, settings)

    def run(self, settings: StepSettings, least: int = 0) -> tuple[float, dict[str, torch.Tensor], Step]:
        step = self.step(settings)
        step.layers = Layers(self.model, least=least)
        for weight in self.weights.values():
            weight.grad = None
        loss = float(step.run(self.examples))
        gradients = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        return loss, gradients, step


@pytest.fixture
def setup(wb: lab.Workbench, data: Dataset) -> Iterator[Setup]:
    asked = {name: parameter.requires_grad for name, parameter in wb.model.named_parameters()}
    wb.model.requires_grad_(False)
    made = Setup(wb, data)
    yield made
    made.adapters.remove()
    for name, parameter in wb.model.named_parameters():
        parameter.requires_grad_(asked[name])


@pytest.mark.parametrize(
    "settings",
    [
        StepSettings(6, recomputed(6, "every-layer", 1), micro_batch=6),
        StepSettings(6, recomputed(6, "every-k", 2), micro_batch=6),
        StepSettings(6, offload=1.0, micro_batch=6),
        StepSettings(6, recomputed(6, "every-layer", 1), offload=1.0, micro_batch=6),
        StepSettings(6, recomputed(6, "every-k", 2), offload=0.5, loss_chunk=16, micro_batch=6),
        StepSettings(6, micro_batch=1),
        StepSettings(6, micro_batch=4),
    ],
    ids=str,
)
def test_no_setting_changes_loss_or_gradients(setup: Setup, settings: StepSettings) -> None:
    wanted, gradients, _ = setup.run(PLAIN)
    loss, found, _ = setup.run(settings)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert found.keys() == gradients.keys() == setup.weights.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_loss_is_what_the_model_itself_computes(setup: Setup) -> None:
    """Against transformers' own loss, media encoded by the model: the bidirectional prompt is built as at inference."""
    raw = Examples(setup.model, lab_processor(setup), None)
    loss, _, _ = setup.run(PLAIN)
    total = 0.0
    for example, messages in zip(setup.examples, _dialogues(), strict=True):
        plain = raw.example(messages)
        assert plain.media is None
        assert "pixel_values" in plain.prompt.inputs
        batch = raw.batch([plain], torch.device("cpu"))
        with torch.no_grad():
            total += float(setup.model(**batch).loss) * example.targets
    assert loss == pytest.approx(total / sum(one.targets for one in setup.examples), rel=1e-5)


def test_layers_that_are_computed_again_keep_their_input_alone(setup: Setup) -> None:
    kept = {}
    for name, settings in {"plain": PLAIN, "again": StepSettings(6, frozenset(range(6)), micro_batch=6)}.items():
        step = setup.step(settings)
        step.layers.keepings = settings.keepings
        kept[name] = _saved_bytes(step, setup)
    hidden = setup.model.config.get_text_config().hidden_size
    longest = max(map(len, setup.examples))
    one_input = 6 * longest * hidden * 4
    assert kept["plain"] > 60 * one_input
    # Six inputs, and what stands before the first layer and after the last.
    assert kept["again"] < 12 * one_input


def test_what_goes_to_the_host_is_counted(setup: Setup) -> None:
    _, _, plain = setup.run(PLAIN)
    _, _, inputs = setup.run(StepSettings(6, frozenset(range(6)), offload=1.0, micro_batch=6))
    _, _, half = setup.run(StepSettings(6, frozenset(range(6)), offload=0.5, micro_batch=6))
    hidden, longest = setup.model.config.get_text_config().hidden_size, max(map(len, setup.examples))
    assert plain.layers.store.moved == 0
    assert inputs.layers.store.moved == 6 * len(setup.examples) * longest * hidden * 4
    assert half.layers.store.moved * 2 == inputs.layers.store.moved


def test_the_layers_are_as_before_after_a_step_and_after_a_failed_one(setup: Setup) -> None:
    step = setup.step(StepSettings(6, frozenset(range(6)), micro_batch=6))
    step.run(setup.examples)
    with pytest.raises(RuntimeError, match="on purpose"), step.layers.active():
        raise RuntimeError("on purpose")
    assert not any("forward" in vars(layer) for layer in decoder_layers(setup.model))


def test_all_answers_are_learnt_when_asked(wb: lab.Workbench) -> None:
    from autoglm_lab.engine.messages import read_messages

    dialogue = read_messages(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello you!"},
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "<answer>A model.</answer>"},
        ]
    )
    last = Examples(wb.model, wb.processor, None).example(dialogue)
    both = Examples(wb.model, wb.processor, None, all_answers=True).example(dialogue)
    first = list(wb.processor.encode_answer("Hello you!"))
    assert last.targets == len(last.answer)
    assert both.targets == len(both.answer) + len(first)
    labels = [label for label in both.learnt if label != -100]
    assert labels == first
    start = both.learnt.index(first[0])
    assert list(both.prompt.ids[start : start + len(first)]) == first


def test_settings_get_stronger_until_nothing_is_left() -> None:
    settings: StepSettings | None = StepSettings(4, loss_chunk=256, micro_batch=2)
    seen = []
    while settings is not None:
        seen.append((len(settings.recompute), settings.loss_chunk, settings.micro_batch, settings.offload))
        settings = settings.stronger()
    assert seen == [
        (0, 256, 2, 0), (2, 256, 2, 0), (4, 256, 2, 0), (4, 64, 2, 0), (4, 64, 1, 0), (4, 64, 1, 1),
    ]  # fmt: skip


def test_shares_of_layers_are_spread() -> None:
    assert spread(8, 0.25) == {0, 4}
    assert spread(5, 1.0) == set(range(5))
    assert not spread(5, 0)
    found = keepings(4, frozenset({0, 2}), 0.5)
    assert [one.recompute for one in found] == [True, False, True, False]
    assert [one.on_host for one in found] == [False, True, False, False]  # of those that are not computed again
    assert recomputed(5, "every-k", 2) == {0, 2, 4}
    assert recomputed(5, "every-layer", 2) == {0, 1, 2, 3, 4}
    assert recomputed(5, "none", 2) == frozenset()


def lab_processor(setup: Setup) -> object:
    return setup.maker.processor


def _dialogues() -> object:
    from autoglm_lab.training.dataset import read_dataset
    from tests.unit.training.conftest import lines

    return read_dataset(lines())


def _saved_bytes(step: Step, setup: Setup) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in setup.model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    batch = setup.maker.batch(setup.examples, torch.device("cpu"))
    with step.layers.active(), torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        loss = step.loss(batch, 1)
    kept = sum(seen.values())
    del loss
    return kept
