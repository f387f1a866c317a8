"""What passes between devices; the meta device stands for a second one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoglm_lab.models.crossing import cross
from autoglm_lab.models.spread import Spread


class Layer(nn.Module):
    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, hidden: Tensor, positions: tuple[Tensor, Tensor], mask: dict[str, Tensor], cache: Any) -> Tensor:
        self.seen.append((hidden, positions, mask, cache))
        return hidden + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.layers = nn.ModuleList([Layer(self.seen) for _ in range(3)])

    def forward(self, hidden: Tensor, fail: bool = False) -> Tensor:
        positions, mask, cache = (torch.ones(2), torch.ones(3)), {"full": torch.ones(4)}, object()
        for layer in self.layers:
            hidden = layer(hidden, positions=positions, mask=mask, cache=cache)
        if fail:
            raise RuntimeError("the last step failed")
        return hidden


@pytest.fixture
def model() -> Model:
    made = Model()
    devices = (torch.device("cpu"), torch.device("meta"))
    cross(made, Spread(devices, (0, 1, 1), {}, {"layers.0": 0, "layers.1": 1, "layers.2": 1}))
    return made


def test_inputs_come_to_the_device_of_their_layer(model: Model) -> None:
    assert model(torch.zeros(5)).device.type == "meta"
    for number, (hidden, positions, mask, _) in enumerate(model.seen):
        wanted = "cpu" if number == 0 else "meta"
        assert {one.device.type for one in (hidden, *positions, *mask.values())} == {wanted}
    assert len({id(cache) for *_, cache in model.seen}) == 1, "what is no tensor stays what it is"


def test_what_every_layer_reads_crosses_once(model: Model) -> None:
    model(torch.zeros(5))
    _, (_, first, _, _), (_, second, _, _) = model.seen
    assert first[0] is second[0]
    assert first[1] is second[1]


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_held_after_a_forward(model: Model, fail: bool) -> None:
    if fail:
        with pytest.raises(RuntimeError):
            model(torch.zeros(5), fail=True)
    else:
        model(torch.zeros(5))
    sides = {hook.__self__ for layer in model.layers for hook in layer._forward_pre_hooks.values()}
    assert len(sides) == 2
    assert not any(side._came for side in sides)
