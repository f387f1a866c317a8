"""Several devices for one model: which tensors lie where, and what crosses from one to the next.

The layers of a decoder run one after the other, so each device gets a run of them; what is before them (embedding,
encoders) stays on the first device, what is behind them (norm, head) on the last. See `crossing` for what moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from autoglm_lab.errors import LoadError
from autoglm_lab.models.anatomy import named_tensors
from autoglm_lab.models.decoder_layers import decoder_layers
from autoglm_lab.models.lean_layers import decoder_of


@dataclass(frozen=True)
class Spread:
    """Where each part of a model lies.

    Attributes:
        devices: the first is the one that a prompt comes to.
        layers: of each layer of the decoder, the number of its device.
        tensors: of each parameter and persistent buffer that does not lie on the first device, the number of its own.
        crossings: paths of the modules whose inputs come from another device, with the number of theirs.
    """

    devices: tuple[torch.device, ...]
    layers: tuple[int, ...]
    tensors: Mapping[str, int]
    crossings: Mapping[str, int]

    def of(self, tensor: str) -> int:
        """The number of the device that a tensor lies on."""
        return self.tensors.get(tensor, 0)

    def at(self, path: str) -> int:
        """The number of the device that a module runs on."""
        found = [(len(part), number) for part, number in self.crossings.items() if _under(path, part)]
        return max(found, default=(0, 0))[1]

    def __str__(self) -> str:
        parts = []
        for number, device in enumerate(self.devices):
            own = [index for index, at in enumerate(self.layers) if at == number]
            parts.append(f"{device}: {_ranges(own)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Load:
    """What a device holds beside the weights, in bytes.

    Attributes:
        layer: keys and values of one layer.
        first: what the first device needs for a moment beyond the others: an encoder at work.
        last: what the last one does: logits.
    """

    layer: int = 0
    first: int = 0
    last: int = 0


def balanced(model: nn.Module, devices: Sequence[torch.device], load: Load | None = None) -> Spread:
    """Runs of layers of which the fullest device holds as little as possible. Works on the meta device.

    Raises:
        LoadError: the model has fewer layers than there are devices, or no list of layers.
    """
    load = load or Load()
    layers, paths = decoder_layers(model), _paths(model)
    if len(layers) < len(devices):
        raise LoadError(
            f"{len(devices)} devices need at least as many layers: this model's decoder has {len(layers) or 'no list'}"
        )
    sizes = [_nbytes(layer) + load.layer for layer in layers]
    behind = _behind(model, paths)
    last = load.last + sum(_nbytes(model.get_submodule(path)) for path in behind)
    whole = sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(model))
    first = load.first + whole - sum(map(_nbytes, layers)) - (last - load.last)
    cuts = _cuts(sizes, len(devices), first, last)
    of_layer = tuple(number for number, (start, end) in enumerate(pairwise(cuts)) for _ in range(start, end))
    placed = {paths[id(layer)]: number for layer, number in zip(layers, of_layer, strict=True)}
    placed |= dict.fromkeys(behind, len(devices) - 1)
    return Spread(tuple(devices), of_layer, _lying(model, placed), placed | _tied_head(model, paths))


def mapped(model: nn.Module, device_map: Mapping[str, str | int | torch.device]) -> Spread:
    """As a device map of accelerate's says: paths of modules, the longest that fits counts, ``""`` is the whole model.

    The device of the embedding is the first.

    Raises:
        LoadError: the map names a place that is no device of the model's, or leaves a tensor without one.
    """
    unknown = [str(at) for at in device_map.values() if str(at) in {"disk", "meta"}]
    if unknown:
        raise LoadError(
            f"the device map puts weights on {unknown[0]!r}: say which modules are off the device with a policy instead"
        )
    found = {path: torch.device(at if not isinstance(at, int) else f"cuda:{at}") for path, at in device_map.items()}
    paths, layers = _paths(model), decoder_layers(model)
    embedding = next((paths[id(one)] for one in [_quietly(model, "get_input_embeddings")] if id(one) in paths), "")
    main = _longest(found, f"{embedding}.weight")
    devices = (main, *(one for one in dict.fromkeys(found.values()) if one != main))
    numbers = {device: number for number, device in enumerate(devices)}
    of_layer = tuple(numbers[_longest(found, f"{paths[id(layer)]}.weight")] for layer in layers)
    # Whatever is mapped apart gets its inputs moved to it, and so does what comes after it.
    placed = {path: numbers[device] for path, device in found.items() if path}
    placed |= {paths[id(layer)]: number for layer, number in zip(layers, of_layer, strict=True)}
    placed |= {path: numbers[_longest(found, f"{path}.weight")] for path in _behind(model, paths)}
    tensors = {name: numbers[_longest(found, name)] for name, _ in named_tensors(model)}
    lying = {name: at for name, at in tensors.items() if at}
    return Spread(devices, of_layer, lying, placed | _tied_head(model, paths))


def _lying(model: nn.Module, placed: Mapping[str, int]) -> dict[str, int]:
    """Where the tensors are that are not on the first device, with these modules placed."""
    tensors = {}
    for name, _ in named_tensors(model):
        number = max(((len(path), at) for path, at in placed.items() if _under(name, path)), default=(0, 0))[1]
        if number:
            tensors[name] = number
    return tensors


def _cuts(sizes: Sequence[int], parts: int, first: int, last: int) -> list[int]:
    """Where to cut a row of sizes so that the largest part is as small as it can be; no part is empty."""
    count = len(sizes)
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)
    best = [[0] * (count + 1) for _ in range(parts)]
    cut = [[0] * (count + 1) for _ in range(parts)]
    for end in range(1, count + 1):
        best[0][end] = first + sums[end] + (last if parts == 1 else 0)
    for part in range(1, parts):
        extra = last if part == parts - 1 else 0
        for end in range(part + 1, count + 1):
            choices = [
                (max(best[part - 1][start], sums[end] - sums[start] + extra), start) for start in range(part, end)
            ]
            best[part][end], cut[part][end] = min(choices)
    cuts = [count]
    for part in range(parts - 1, 0, -1):
        cuts.append(cut[part][cuts[-1]])
    return [0, *reversed(cuts)]


def _behind(model: nn.Module, paths: Mapping[int, str]) -> list[str]:
    """What runs after the layers: the decoder's last norm, and a head that is not tied to the embedding."""
    decoder, layers = decoder_of(model), decoder_layers(model)
    within = {id(part) for layer in layers for part in layer.modules()}
    names = [name for name, child in decoder.named_children() if id(child) not in within]
    lists = [name for name, child in decoder.named_children() if any(id(one) in within for one in child.modules())]
    order = [name for name, _ in decoder.named_children()]
    after = order[order.index(lists[-1]) + 1 :] if lists else []
    found = [getattr(decoder, name) for name in after if name in names and "norm" in name]
    head = _quietly(model, "get_output_embeddings")
    if isinstance(head, nn.Module) and not _tied_head(model, paths):
        found.append(head)
    return [paths[id(module)] for module in found if id(module) in paths]


def _tied_head(model: nn.Module, paths: Mapping[int, str]) -> dict[str, int]:
    """A head that shares the embedding's weight runs on the first device, where that is; empty: it has its own."""
    head, embedding = _quietly(model, "get_output_embeddings"), _quietly(model, "get_input_embeddings")
    weight = getattr(head, "weight", None)
    tied = weight is not None and weight is getattr(embedding, "weight", None)
    return {paths[id(head)]: 0} if tied and id(head) in paths else {}


def _quietly(model: Any, accessor: str) -> Any:
    try:
        return getattr(model, accessor)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _paths(model: nn.Module) -> dict[int, str]:
    return {id(module): path for path, module in model.named_modules()}


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(module))


def _under(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _longest(found: Mapping[str, torch.device], name: str) -> torch.device:
    fitting = [path for path in found if _under(name, path)]
    if not fitting:
        raise LoadError(f"the device map says nothing of {name}: name one of the modules that hold it, or ''")
    return found[max(fitting, key=len)]


def _ranges(numbers: Sequence[int]) -> str:
    if not numbers:
        return "no layers"
    return (
        f"layers {numbers[0]} to {numbers[-1]}"
        if len(numbers) == numbers[-1] - numbers[0] + 1
        else (f"{len(numbers)} layers")
    )
