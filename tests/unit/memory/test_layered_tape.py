"""A model of many layers, planned from one of few: what it allocates is what a trace of all its layers says."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from autoglm_lab.memory.planning.allocator_model import AllocatorModel
from autoglm_lab.memory.planning.layered_tape import LayeredTape, least_layers
from autoglm_lab.memory.planning.tape import Tape
from autoglm_lab.memory.planning.traced_model import TracedModel

PERIOD, LAYERS = 3, 11
CHUNKS = [(0, 96), (96, 96), (192, 40), (232, 1)]


@pytest.fixture(scope="module")
def config() -> tf.PreTrainedConfig:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * LAYERS
    return tf.Gemma3TextConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=64, layer_types=kinds[:LAYERS],
    )  # fmt: skip


def played(tape: Tape) -> tuple[int, int, int]:
    allocator = AllocatorModel()
    allocator.play(tape)
    return allocator.reserved, allocator.peak_allocated, tape.kept


def test_a_few_layers_tell_what_all_of_them_allocate(config: tf.PreTrainedConfig) -> None:
    few = least_layers(LAYERS, PERIOD)
    assert few == 5
    told = TracedModel(config, torch.bfloat16, "cuda", few).whole(CHUNKS).deepened(LAYERS, PERIOD)
    whole = TracedModel(config, torch.bfloat16, "cuda", LAYERS).whole(CHUNKS)
    assert len(whole.starts) == len(CHUNKS) and {len(starts) for starts in whole.starts} == {LAYERS + 1}
    assert played(told) == pytest.approx(played(whole.tape), rel=0.01)
    assert whole.deepened(LAYERS, PERIOD).sizes == whole.tape.sizes


@pytest.mark.parametrize(
    ("layers", "period", "few"), [(34, 6, 10), (12, 6, 12), (6, 6, 6), (36, 3, 6), (7, 3, 4), (2, 3, 2)]
)
def test_few_layers_end_as_all_of_them_do(layers: int, period: int, few: int) -> None:
    assert least_layers(layers, period) == few
    assert few == layers or (few > period and (layers - few) % period == 0)


def test_what_does_not_go_by_kinds_is_not_put_together() -> None:
    tape = Tape((0, 1, ~0, 2, ~1), (8, 8, 8))
    layered = LayeredTape(tape, ((0, 1, 3, 5),))
    with pytest.raises(ValueError, match="do not end"):
        layered.deepened(6, 2)
    # The second layer frees what was there before the first: if it came twice, it would free it twice.
    with pytest.raises(ValueError, match="is freed"):
        LayeredTape(Tape((0, 1, ~0, 2), (8, 8, 8)), ((1, 2, 4),)).deepened(3, 1)
