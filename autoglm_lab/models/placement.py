"""Which parts of a model go where, when one device cannot hold them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from autoglm_lab.models.anatomy import named_tensors
from autoglm_lab.models.decoder_layers import decoder_layers

STAGES = 2
"""Places on the device that parts from the host come to: one is read while the other is filled."""
_SMALLEST = 0.02


@dataclass(frozen=True)
class HostPart:
    """A part of a decoder's layer (its attention, its feed-forward, one product of an attention) whose weights stay on
    the host.

    Attributes:
        path: in the model.
        module: the part.
        tensors: its parameters and persistent buffers, by their name in the model.
        nbytes: of these.
    """

    path: str
    module: nn.Module
    tensors: dict[str, Tensor]
    nbytes: int


@dataclass(frozen=True)
class HostShare:
    """What of a model stays on the host.

    Attributes:
        rows: the embedding, of which a step reads a few rows; None: it stays on the device.
        parts: what comes to the device for every use, in the order of a forward.
    """

    rows: HostPart | None
    parts: tuple[HostPart, ...]

    @property
    def names(self) -> frozenset[str]:
        """Every tensor of it."""
        return frozenset(name for part in (self.rows, *self.parts) if part is not None for name in part.tensors)

    @property
    def saved(self) -> int:
        """Bytes that the device holds less."""
        return saved_by(self.parts) + (0 if self.rows is None else self.rows.nbytes)

    @property
    def passing(self) -> int:
        """Bytes that pass the bus for every token."""
        return _total(self.parts)


def host_share(model: Any, saved: int) -> HostShare:
    """What to keep on the host so that the device holds at least ``saved`` bytes less.

    First the embedding, which costs no time worth naming, then parts of the layers. Works on the meta device.
    """
    rows = _embedding(model) if saved > 0 else None
    return HostShare(rows, host_parts(model, saved - (0 if rows is None else rows.nbytes)))


def host_parts(model: Any, saved: int) -> tuple[HostPart, ...]:
    """The parts to keep on the host so that the device holds at least ``saved`` bytes less, in the order of a forward.

    All that is chosen passes the bus for every token, so it is as little as possible: what is saved and the stages,
    which are as large as the largest part chosen; where the products of attentions are enough, their stages are the
    smallest. Parts are spread evenly, for what the layers between them compute hides some of the copies. Where the
    layers hold less than that, it is all of them. Works on the meta device.
    """
    parts, products = _parts(model)
    if saved <= 0 or not parts:
        return ()
    choices = [
        _chosen([part for part in some if part.nbytes <= size], saved)
        for some in (parts, products)
        for size in {one.nbytes for one in some}
    ]
    enough = [chosen for chosen in choices if saved_by(chosen) >= saved]
    best = min(enough, key=_total) if enough else max(choices, key=saved_by)
    order = {part.path: number for some in (parts, products) for number, part in enumerate(some)}
    return tuple(sorted(best, key=lambda part: order[part.path]))


def saved_by(parts: Sequence[HostPart]) -> int:
    """Bytes that the device holds less with ``parts`` on the host."""
    return _total(parts) - stage_bytes(parts)


def stage_bytes(parts: Iterable[HostPart]) -> int:
    """Bytes of the stages on the device, less their rounding."""
    return STAGES * max((part.nbytes for part in parts), default=0)


def _total(parts: Iterable[HostPart]) -> int:
    return sum(part.nbytes for part in parts)


def _chosen(parts: list[HostPart], saved: int) -> list[HostPart]:
    """As many of the larger parts as the bytes need, and smaller ones for the rest."""
    needed, chosen = saved + stage_bytes(parts), []
    for size in sorted({part.nbytes for part in parts}, reverse=True):
        alike = [part for part in parts if part.nbytes == size]
        smaller = any(part.nbytes < size for part in parts)
        count = needed // size if smaller else -(-needed // size)
        rest = _total(part for part in parts if part.nbytes < size)
        if smaller and needed - count * size > rest:
            count += 1
        count = max(0, min(count, len(alike)))
        chosen += _spread(alike, count)
        needed -= count * size
        if needed <= 0:
            break
    return chosen


def _spread(parts: list[HostPart], count: int) -> list[HostPart]:
    return [parts[index * len(parts) // count] for index in range(count)]


def _parts(model: Any) -> tuple[list[HostPart], list[HostPart]]:
    """Every part that may be kept on the host: the large children of the layers, and the large products of attentions,
    all less what they share with others.

    A feed-forward is not cut: a long prompt goes through it in slices, and each would bring its products anew.
    """
    own = _Own(model)
    paths = {id(module): path for path, module in model.named_modules()}
    children = [
        (f"{paths[id(layer)]}.{step}", child)
        for layer in decoder_layers(model)
        for step, child in layer.named_children()
    ]
    whole = [own.part(path, child) for path, child in children]
    products = [
        own.part(f"{path}.{step}", one)
        for path, child in children
        if type(child).__name__.endswith("Attention")
        for step, one in child.named_children()
        if isinstance(one, nn.Linear)
    ]
    smallest = _SMALLEST * max((part.nbytes for part in whole), default=0)
    large, larger = ([part for part in some if part.nbytes > smallest] for some in (whole, products))
    return large, larger


def _embedding(model: Any) -> HostPart | None:
    """The embedding of the tokens, where no head shares it."""
    try:
        module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    path = next((path for path, one in model.named_modules() if one is module), None)
    if not isinstance(module, nn.Module) or path is None:
        return None
    part, whole = _Own(model).part(path, module), sum(one.nbytes for _, one in named_tensors(module))
    return part if part.tensors and part.nbytes == whole else None


class _Own:
    """Which tensors of a model belong to one module alone."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(tensor): name for name, tensor in named_tensors(model)}
        self._uses: dict[int, int] = {}
        for module in model.modules():
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                self._uses[id(tensor)] = self._uses.get(id(tensor), 0) + 1

    def part(self, path: str, module: nn.Module) -> HostPart:
        own = {self._names[id(one)]: one for _, one in named_tensors(module) if self._uses[id(one)] == 1}
        return HostPart(path, module, own, sum(one.nbytes for one in own.values()))
