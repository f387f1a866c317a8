"""The lossy settings whose cost is measured, and the bytes that each leaves of the phone model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.loading import outline
from autoglm_lab.models.precision import module_nbytes
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.opening import load
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.workbench import Workbench

CONTEXT = 8192
"""Tokens of a conversation whose keys and values are counted."""
PLAIN = {"precision": "model", "overflow": "stop", "max_tokens": None}
_ENCODERS = ("vision", "audio", "projector")


@dataclass(frozen=True)
class Setting:
    """One lossy setting.

    Attributes:
        name: for people.
        kv: what it is in ``policy.kv``.
        weights: precision by module.
    """

    name: str
    kv: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def window(cls, tokens: int, sinks: int) -> Setting:
        kv = {"overflow": "window", "max_tokens": tokens, "sinks": sinks}
        return cls(f"window of {tokens} tokens with {sinks} sinks", kv)

    @property
    def kind(self) -> Literal["kv", "weights", "both"]:
        if self.kv and self.weights:
            return "both"
        return "kv" if self.kv else "weights"

    @property
    def keeps_all(self) -> bool:
        """Whether every token stays, so that distributions can be compared token by token."""
        return "max_tokens" not in self.kv

    def within(self, modules: Mapping[str, Any]) -> dict[str, str]:
        """The precisions of those modules that a model has."""
        return {name: precision for name, precision in self.weights.items() if name in modules}

    def phone_bytes(self) -> dict[str, int]:
        """Bytes that AutoGLM-Phone-9B takes then: its weights, and the keys and values of `CONTEXT` tokens."""
        phone = _phone()
        modules = {spec.name: spec.nbytes for spec in anatomy(phone)}
        for name, precision in self.within(modules).items():
            modules[name] = module_nbytes(phone, precision)[name]
        form = PageFormat.of(phone.config, torch.bfloat16, self.kv.get("precision", "model"))
        assert form is not None
        tokens = min(CONTEXT, self.kv.get("max_tokens", CONTEXT))
        return {"weights": sum(modules.values()), "kv": form.nbytes * tokens // PAGE_TOKENS}


def _all_in(precision: str) -> dict[str, str]:
    return dict.fromkeys((*_ENCODERS, "text", "head"), precision)


KV = (
    Setting("KV in int8", {"precision": "int8"}),
    Setting("KV in int4", {"precision": "int4"}),
)
FORGETTING = (
    Setting.window(256, 64),
    Setting.window(96, 16),
    Setting("oldest turns dropped at 256 tokens", {"overflow": "drop-oldest-turns", "max_tokens": 256}),
)
"""The first window cuts most of the recalls and no tap, the second the taps too."""
WEIGHTS = (
    Setting("all weights in bfloat16", weights=_all_in("bfloat16")),
    Setting("all weights in float16", weights=_all_in("float16")),
    Setting("text and head in int8", weights={"text": "int8", "head": "int8"}),
    Setting("vision in int8", weights={"vision": "int8"}),
    Setting("all weights in int8", weights=_all_in("int8")),
    Setting("text in int4, head in int8", weights={"text": "int4", "head": "int8"}),
    Setting("vision in int4", weights={"vision": "int4"}),
    Setting("text in nf4, head in int8", weights={"text": "nf4", "head": "int8"}),
    Setting("text in 2:4", weights={"text": "2:4"}),
    Setting("vision in 2:4", weights={"vision": "2:4"}),
)
BOTH = (Setting("text in int4, head in int8, KV in int4", {"precision": "int4"}, {"text": "int4", "head": "int8"}),)
ANSWERED = (*KV, *FORGETTING, *WEIGHTS, *BOTH)
"""Of the embedded model."""
FORETOLD = (
    *KV,
    Setting.window(512, 64),
    *(one for one in WEIGHTS if "text" in one.weights and one.name != "all weights in int8"),
)
"""Of SmolLM2, which has a text alone."""


@contextlib.contextmanager
def opened(setting: Setting, base: Workbench, source: str, policy: MemoryPolicy) -> Iterator[Workbench]:
    """A workbench under a setting: ``base`` where its weights stay as they are, else the model loaded anew in float32.

    Args:
        policy: everything that the setting leaves open.
    """
    if setting.weights:
        names = {spec.name: spec for spec in anatomy(outline(source, device="cpu").model)}
        precisions = setting.within(names)
        with load(source, dtype="float32", device=str(base.model.device), quantize=precisions) as wb:
            modules = {name: {"precision": precision} for name, precision in precisions.items()}
            wb.policy = policy.replace(kv={**PLAIN, **setting.kv}, modules=modules)
            yield wb
        return
    before = base.policy
    base.policy = policy.replace(kv={**PLAIN, **setting.kv})
    try:
        yield base
    finally:
        base.policy = before


@functools.cache
def _phone() -> PreTrainedModel:
    return skeleton(outline("autoglm-phone-9b", device="cpu").model.config, torch.bfloat16)
