"""What images and sounds become before the decoder reads them, one medium at a time, and kept by content."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
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
        self._asks = {kind: _asked(encode) for kind, encode in self._encoders.items() if encode is not None}
        self._weights, self._writes = tuple(model.parameters()), 0
        self._listed: dict[MediaKind, bool] = {}
        self._mixed: set[MediaKind] = set()

    def separate(self, prompt: Prompt, start: int) -> bool:
        """Whether the media from token ``start`` on can be encoded one by one, and their outputs cut at will."""
        runs = [run for run in prompt.runs if run.start + run.length > start]
        return (
            self._takes_outputs
            and not any(run.kind in self._mixed for run in runs)
            and all(self._encoders[run.kind] is not None and self._has_all(prompt, run) for run in runs)
        )

    def _has_all(self, prompt: Prompt, run: MediaRun) -> bool:
        given = prompt.inputs_of(run)
        return run.digest in prompt.live or (bool(given) and self._asks[run.kind] <= given.keys())

    def missing(self, prompt: Prompt, start: int) -> set[MediaKind]:
        """The kinds of media from token ``start`` on that an encoder has to run for."""
        return {run.kind for run in self.missing_runs(prompt, start)}

    def missing_runs(self, prompt: Prompt, start: int) -> list[MediaRun]:
        """The media from token ``start`` on that an encoder has to run for, one of each content."""
        self._forget_outdated()
        kept = self._store is not None and self.separate(prompt, start)
        missing = {
            run.digest: run
            for run in prompt.runs
            if run.start >= start
            and run.digest not in prompt.live
            and not (kept and self._store is not None and self._store.has(_key(prompt, run)))
        }
        return list(missing.values())

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
                outputs[run.digest][run.features_before(start) : run.features_before(end)]
                for run in prompt.runs
                if run.kind == kind and run.features_before(start) < run.features_before(end)
            ]
            if parts:
                pooled = tuple(parts) if self._listed.get(kind, kind == "image") else torch.cat(parts)
                given[kind] = BaseModelOutputWithPooling(pooler_output=pooled)  # type: ignore[arg-type]
        return {"mm_encoder_outputs": _Watched(given)} if given else {}

    def check_used(self, arguments: dict[str, Any]) -> None:
        """After a forward with `arguments`: some families take encoder outputs of one kind and ignore another's.

        Raises:
            UnusedOutputsError: the forward did not look at one of them. From now on the model encodes that kind itself.
        """
        given = arguments.get("mm_encoder_outputs")
        if isinstance(given, _Watched) and given.unread:
            self._mixed |= given.unread
            raise UnusedOutputsError(f"this model takes no encoder outputs for {', '.join(sorted(given.unread))}")

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
        try:
            output = encoder(**inputs, return_dict=True)
        except TypeError:  # it asks for something else than the processor gives
            self._mixed.add(run.kind)
            return None
        pooled = getattr(output, "pooler_output", None)
        extra = {name for name, value in getattr(output, "items", dict)() if value is not None} - _PLAIN
        if pooled is None or extra:
            self._mixed.add(run.kind)
            return None
        self._listed[run.kind] = isinstance(pooled, list | tuple)
        features = torch.cat(list(pooled)) if isinstance(pooled, list | tuple) else pooled
        features = features.reshape(-1, features.shape[-1])
        if features.shape[0] != run.features:
            self._mixed.add(run.kind)
            return None
        return features


class UnusedOutputsError(Exception):
    """A forward ignored encoder outputs that it was given."""


class _Watched(dict[str, Any]):
    """Encoder outputs by kind, and which of them nobody has looked at."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.unread: set[Any] = set(given)

    def get(self, key: str, default: Any = None) -> Any:
        self.unread.discard(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.unread.discard(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # so that a copy asks for each of them, instead of taking the whole table

    def items(self) -> Any:
        self.unread.clear()
        return super().items()

    def values(self) -> Any:
        self.unread.clear()
        return super().values()


def _asked(encode: Callable[..., Any]) -> set[str]:
    """The inputs that an encoder's function cannot do without."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(encode).parameters.values()
    return {one.name for one in parameters if one.kind in kinds and one.default is inspect.Parameter.empty}


def _key(prompt: Prompt, run: MediaRun) -> str:
    """The content, and the sizes that the processor brought it to."""
    sizes = ",".join(f"{name}{tuple(value.shape)}" for name, value in sorted(prompt.inputs_of(run).items()))
    return f"{run.kind}:{run.digest}:{run.length}:{sizes}"
