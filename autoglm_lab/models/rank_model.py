"""A resolved model made one rank's: narrower layers, and the parts of the sources that belong to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from autoglm_lab.errors import LoadError
from autoglm_lab.models.anatomy import named_tensors
from autoglm_lab.models.checkpoint import FileTensor
from autoglm_lab.models.loading import Resolved
from autoglm_lab.models.tensor_parallel import Cut, Share, encoders_apart, mark, narrow, share_of
from autoglm_lab.models.tensor_sources import CutTensor, DummyTensor, PackedTensor, Source


class Group(Protocol):
    """What the ranks do together with tensors of one shape, on every rank in the same order."""

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's; ``tensor`` may be written to."""
        ...

    def put_together(self, tensor: Tensor) -> Tensor:
        """Every rank's behind one another along the last dimension."""
        ...


def take_share(resolved: Resolved, ranks: int, rank: int) -> Share:
    """Leave of a model what ``rank`` of ``ranks`` holds, before precisions are chosen and weights come.

    Raises:
        LoadError: it cannot be cut so, see `share_of`; or its encoders cannot be on one rank alone.
    """
    model = resolved.model
    if not encoders_apart(model):
        raise LoadError(
            f"{type(model).__name__} encodes images or sounds inside its own forward, which several ranks cannot do "
            "apart: leave tensor_parallel out"
        )
    share = share_of(model, ranks, rank)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    for layer in share.layers:
        for name, cut in layer.cuts.items():
            path = f"{layer.path}.{name}"
            if path in shapes:
                resolved.sources[path] = _part(resolved.sources[path], shapes[path], cut)
        bias = f"{layer.path}.bias"
        if rank and layer.style == "rows" and bias in resolved.sources:
            resolved.sources[bias] = DummyTensor("zeros", 0.0, 0)  # it is added to a sum, once
    narrow(model, share)
    for config in (model.config, resolved.config):
        mark(config, ranks, rank)
    return share


def join(model: Any, share: Share, group: Group) -> None:
    """Let the layers that are cut work together with the other ranks'. Precisions must be as they are to stay."""
    for layer in share.layers:
        module = model.get_submodule(layer.path)
        if layer.style == "rows":
            module.register_forward_hook(lambda _module, _given, output: group.add_up(output))
        elif layer.style == "gathered":
            module.register_forward_hook(lambda _module, _given, output: group.put_together(output))
        elif layer.style == "embedding":
            _look_up_together(module, layer.cuts["weight"].rows[0], group)


def _look_up_together(module: Any, span: tuple[int, int], group: Group) -> None:
    """Ids of other ranks give zeros here."""
    first, end = span
    foreign: list[Tensor] = []

    def own(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (ids,) = given
        outside = (ids < first) | (ids >= end)
        foreign.append(outside)
        return ((ids - first).masked_fill(outside, 0),)

    def all_of(_: Any, __: Any, output: Tensor) -> Tensor:
        return group.add_up(output.masked_fill(foreign.pop()[..., None], 0))

    module.register_forward_pre_hook(own)
    module.register_forward_hook(all_of)


def _part(source: Source, shape: tuple[int, ...], cut: Cut) -> Source:
    assert not isinstance(source, PackedTensor | CutTensor)
    rows = cut.rows
    if isinstance(source, FileTensor) and cut.columns is None and len(rows) == 1:
        first, end = rows[0]  # one span of whole rows is a piece of the file
        row = source.nbytes // shape[0]
        return replace(source, offset=source.offset + first * row, nbytes=(end - first) * row, shape=cut.shape(shape))
    return CutTensor(source, shape, rows, cut.columns)
