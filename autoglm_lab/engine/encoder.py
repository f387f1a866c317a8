"""What images and sounds become before the decoder reads them, one medium at a time, and kept by content."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from autoglm_lab.engine.prompt import MediaKind, MediaRun, Prompt

_PLAIN = {"last_hidden_state", "pooler_output", "hidden_states", "attentions", "attention_mask"}


class Features(Protocol):
    """Where outputs are kept by content."""

    def clear(self) -> int: ...
    def get(self, key: str) -> Tensor | None: ...
    def put(self, key: str, features: Tensor) -> None: ...
    def has(self, key: str) -> bool: ...
    def has_any(self, beginning: str) -> bool: ...


class Encoder:
    """Runs a model's encoders apart from its decoder, where the model allows that.

    Args:
        features: keeps outputs between turns; None: nothing is kept.
    """

    def __init__(self, model: Any, features: Features | None = None) -> None:
        self._model, self._store = model, features
        self._encoders: dict[MediaKind, Callable[..., Any] | None] = {
            "image": getattr(model, "get_image_features", None),
            "audio": getattr(model, "get_audio_features", None),
        }
        self._takes_outputs = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        self._weights, self._writes = tuple(model.parameters()), 0
        self._listed: dict[MediaKind, bool] = {}
        self._mixed: set[MediaKind] = set()

    def separate(self, prompt: Prompt, start: int) -> bool:
        """Whether the media from token ``start`` on can be encoded one by one, and their outputs cut at will."""
        runs = [run for run in prompt.runs if run.start + run.length > start]
        return (
            self._takes_outputs
            and not any(run.kind in self._mixed for run in runs)
            and all(self._encoders[run.kind] is not None and prompt.inputs_of(run) for run in runs)
        )

    def missing(self, prompt: Prompt, start: int) -> set[MediaKind]:
        """The kinds of media from token ``start`` on that an encoder has to run for."""
        self._forget_outdated()
        return {
            run.kind
            for run in prompt.runs
            if run.start >= start
            and run.digest not in prompt.live
            and not (self._store is not None and self.separate(prompt, start) and self._store.has(_key(prompt, run)))
        }

    def knows(self, kind: MediaKind, digest: str) -> bool:
        """Whether an output of this content is kept, in some size: to be asked before it is prepared."""
        return self._store is not None and self._store.has_any(f"{kind}:{digest}:")

    def encode(self, prompt: Prompt, start: int) -> dict[str, Tensor] | None:
        """Outputs ``[tokens, hidden]`` of the media from token ``start`` on, by digest.

        Returns:
            None where this model's encoders give more than that, which only its own forward can use.
        """
        self._forget_outdated()
        outputs: dict[str, Tensor] = {}
        for run in prompt.runs:
            if run.start + run.length <= start or run.digest in outputs:
                continue
            features = prompt.live.get(run.digest)
            if features is None and self._store is not None:
                features = self._store.get(_key(prompt, run))
            if features is None:
                features = self._run(prompt, run)
                if features is None:
                    return None
                if self._store is not None:
                    self._store.put(_key(prompt, run), features)
            outputs[run.digest] = features
        return outputs

    def arguments(self, prompt: Prompt, outputs: dict[str, Tensor], start: int, end: int) -> dict[str, Any]:
        """The encoders' outputs for tokens ``[start, end)``, as the model's forward takes them."""
        given: dict[str, Any] = {}
        for kind in ("image", "audio"):
            parts = [
                outputs[run.digest][max(0, start - run.start) : end - run.start]
                for run in prompt.runs
                if run.kind == kind and run.start < end and run.start + run.length > start
            ]
            if parts:
                pooled = tuple(parts) if self._listed.get(kind, kind == "image") else torch.cat(parts)
                given[kind] = BaseModelOutputWithPooling(pooler_output=pooled)  # type: ignore[arg-type]
        return {"mm_encoder_outputs": given} if given else {}

    def _forget_outdated(self) -> None:
        """Outputs of weights that were written since are no longer true. A write through ``.data`` leaves no trace."""
        if self._store is not None:
            writes = sum(weight._version for weight in self._weights)  # noqa: SLF001 - torch's only count of writes
            if writes != self._writes:
                self._store.clear()
                self._writes = writes

    def _run(self, prompt: Prompt, run: MediaRun) -> Tensor | None:
        encoder = self._encoders[run.kind]
        assert encoder is not None
        inputs = {name: value.to(self._model.device) for name, value in prompt.inputs_of(run).items()}
        output = encoder(**inputs, return_dict=True)
        pooled = getattr(output, "pooler_output", None)
        extra = {name for name, value in getattr(output, "items", dict)() if value is not None} - _PLAIN
        if pooled is None or extra:
            self._mixed.add(run.kind)
            return None
        self._listed[run.kind] = isinstance(pooled, list | tuple)
        features = torch.cat(list(pooled)) if isinstance(pooled, list | tuple) else pooled
        features = features.reshape(-1, features.shape[-1])
        if features.shape[0] != run.length:
            self._mixed.add(run.kind)
            return None
        return features


def _key(prompt: Prompt, run: MediaRun) -> str:
    """The content, and the sizes that the processor brought it to."""
    sizes = ",".join(f"{name}{tuple(value.shape)}" for name, value in sorted(prompt.inputs_of(run).items()))
    return f"{run.kind}:{run.digest}:{run.length}:{sizes}"
