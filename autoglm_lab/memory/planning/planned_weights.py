"""Bytes of a model's weights by module: in any precision, whole on the device or partly on the host."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoglm_lab.memory.residency.slab import lay_out
from autoglm_lab.models.anatomy import anatomy, named_tensors
from autoglm_lab.models.placement import host_share, stage_bytes
from autoglm_lab.models.precision import convert, made_in, precisions_of
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.policy import MemoryPolicy

_GRAINS = {"cuda": 2 << 20, "cpu": 4096}


@dataclass(frozen=True)
class SplitWeights:
    """Where the bytes of the weights are.

    Attributes:
        slabs: by module, on the device while the module is there.
        stages: on the device, for what comes from the host.
        on_host: bytes that stay on the host.
        passing: bytes of these that pass the bus for every token.
    """

    slabs: Mapping[str, int]
    stages: int
    on_host: int
    passing: int


class PlannedWeights:
    """The weights of a model without values.

    Args:
        kind: of the device, ``cuda`` or ``cpu``.
    """

    def __init__(self, model: Any, kind: str) -> None:
        self._model, self._grain, self._kind = model, _GRAINS[kind], kind
        self._tensors: dict[str, Any] = dict(named_tensors(model))
        self._names = {spec.name: spec.tensors for spec in anatomy(model)}
        whole = {name: self._slab(tensors) for name, tensors in self._names.items()}
        self._splits = {0: SplitWeights(whole, 0, 0, 0)}
        self._others: dict[str, PlannedWeights] = {}

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self._names)

    def under(self, policy: MemoryPolicy) -> SplitWeights:
        """The weights as a policy keeps them, in its precision and at its place.

        Raises:
            LoadError: the model's layers cannot be kept in that precision.
        """
        precisions = policy.precisions()
        if precisions == precisions_of(self._model):
            return self._split(policy.placement.host_bytes)
        key = json.dumps(precisions, sort_keys=True)
        if key not in self._others:
            model = skeleton(self._model.config, made_in(self._model))
            convert(model, precisions)
            self._others[key] = PlannedWeights(model, self._kind)
        return self._others[key].under(policy)

    def _split(self, host_bytes: int) -> SplitWeights:
        if self._kind == "cpu":
            host_bytes = 0
        if host_bytes not in self._splits:
            self._splits[host_bytes] = self._part(host_bytes)
        return self._splits[host_bytes]

    def _part(self, host_bytes: int) -> SplitWeights:
        share = host_share(self._model, host_bytes)
        if not share.names <= set(self._names.get("text", ())):
            return self._splits[0]
        slabs = dict(self._splits[0].slabs)
        slabs["text"] = self._slab(tuple(name for name in self._names["text"] if name not in share.names))
        on_host = sum(self._tensors[name].nbytes for name in share.names)
        return SplitWeights(slabs, self._rounded(stage_bytes(share.parts)), on_host, share.passing)

    def _slab(self, tensors: tuple[str, ...]) -> int:
        return self._rounded(lay_out({name: self._tensors[name] for name in tensors})[1])

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self._grain) * self._grain
