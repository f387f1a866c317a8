"""A model's own code, with a few of its layers and without data, as the engine's steps run it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.kv.paged_attention import decoder_configs, paged
from autoglm_lab.memory.planning.layered_tape import LayeredTape
from autoglm_lab.memory.planning.recorder import Recorder, recording, without_data
from autoglm_lab.memory.planning.tape import Tape
from autoglm_lab.memory.planning.traced_cache import TracedCache
from autoglm_lab.models.decoder_layers import decoder_layers
from autoglm_lab.models.lean_layers import feed_forwards, norm_of, rms_norms
from autoglm_lab.models.precision import convert
from autoglm_lab.models.quantized_linear import without_weights
from autoglm_lab.models.row_merge import RowMerge
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.schedule import FEED_FORWARD_TOKENS

Kind = Literal["cuda", "cpu"]
_DEPTHS = ("num_hidden_layers", "depth", "encoder_layers", "num_layers", "n_layers")


class TracedModel:
    """Records the steps of one model on one kind of device.

    Args:
        layers: how many the decoder and each encoder keep; None: all.
        lean: as the engine computes (`LeanForward`); False: as plain transformers does.
        precisions: of the weights, by module (`precision.convert`).

    Attributes:
        layers: of the decoder.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        kind: Kind,
        layers: int | None,
        *,
        lean: bool = True,
        precisions: Mapping[str, str] | None = None,
    ) -> None:
        self._kind, self._dtype, self._lean = kind, dtype, lean
        self._model: Any = skeleton(config if layers is None else shortened(config, layers), dtype)
        convert(self._model, precisions or {})
        self.layers = int(self._model.config.get_text_config().num_hidden_layers)
        self._configs = decoder_configs(self._model)
        self._fused = _fused_norms(self._model) if lean and kind == "cuda" else set()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        without_data(self._model, self._mode)
        parameters = inspect.signature(self._model.forward).parameters
        self._accepted = frozenset(parameters)
        self._planes = 3 if any(hasattr(module, "rope_deltas") for module in self._model.modules()) else 1

    def prefill(self, form: PageFormat | None, before: int, new: int, *, bidirectional: bool = False) -> Tape:
        """Reading ``new`` tokens after ``before``.

        Args:
            form: of the pages; None: transformers' own cache, which the tape then holds.
        """
        with self._stepping() as recorder:
            self._step(form, 1, before, new, bidirectional=bidirectional)
            # Read before Python collects again: what lies in circles would be freed on some runs and not on others.
            tape: Tape = recorder.tape
        return tape

    def decode(self, form: PageFormat | None, batch: int, before: int) -> Tape:
        """Reading one token of each conversation."""
        with self._stepping() as recorder:
            self._step(form, batch, before, 1, graph=True)
            tape: Tape = recorder.tape
        return tape

    def whole(self, chunks: Sequence[tuple[int, int]], pictured: int = 0) -> LayeredTape:
        """Reading ``(before, new)`` tokens, chunk by chunk, into transformers' own cache, which stays at the end.

        Args:
            pictured: how many of the first tokens stand for images.
        """
        with self._stepping(every_slice=True) as recorder, self._marked(recorder) as starts:
            cache, logits = DynamicCache(config=self._model.config), None
            for before, new in chunks:
                rows = max(0, min(pictured - before, new))
                logits = self._step(cache, 1, before, new, pictured=rows)  # those before are held meanwhile
            del logits
            tape: Tape = recorder.tape
        each = self.layers + 1
        passes = tuple(tuple(starts[at : at + each]) for at in range(0, len(starts), each))
        return LayeredTape(tape, passes)

    @contextlib.contextmanager
    def _marked(self, recorder: Recorder) -> Iterator[list[int]]:
        """Where each layer of the decoder begins, and where the last one ends."""
        starts: list[int] = []
        layers = decoder_layers(self._model)
        hooks = [layer.register_forward_pre_hook(lambda *_: starts.append(recorder.position)) for layer in layers]
        hooks += [layers[-1].register_forward_hook(lambda *_: starts.append(recorder.position))] if layers else []
        try:
            yield starts
        finally:
            for hook in hooks:
                hook.remove()

    def encode(self, kind: Literal["image", "audio"], inputs: dict[str, Tensor]) -> tuple[Tape, int]:
        """Encoding one medium. Returns its tape, at whose end the output stays, and the output's bytes."""
        encoder: Callable[..., Any] = getattr(self._model, f"get_{kind}_features")
        with recording(self._mode, self._model, self._kind) as recorder:
            given = {
                name: torch.empty_like(value) if value.is_floating_point() else value.clone()
                for name, value in inputs.items()
            }
            output = encoder(**given, return_dict=True)
            pooled = output.pooler_output
            features = torch.cat(list(pooled)) if isinstance(pooled, list | tuple) else pooled
            features = features.reshape(-1, features.shape[-1])
            del given, output, pooled
            tape = recorder.tape
        return tape, features.untyped_storage().nbytes()

    def _step(
        self,
        form: PageFormat | Cache | None,
        batch: int,
        before: int,
        new: int,
        *,
        bidirectional: bool = False,
        graph: bool = False,
        pictured: int = 0,
    ) -> Tensor:
        shape = (batch, new) if self._planes == 1 else (self._planes, batch, new)
        arguments: dict[str, Any] = {"position_ids": torch.zeros(shape, dtype=torch.long)}
        if not graph:
            arguments["attention_mask"] = torch.ones((batch, before + new), dtype=torch.long)
        if bidirectional:
            arguments["block_sequence_ids"] = torch.zeros((1, before + new), dtype=torch.long)
        if "logits_to_keep" in self._accepted:
            arguments["logits_to_keep"] = 1
        ids = torch.zeros((batch, new), dtype=torch.long)
        merging: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        image = getattr(self._model.config, "image_token_id", None)
        if pictured and image is not None and "mm_encoder_outputs" in self._accepted:
            ids[:, :pictured] = int(image)
            arguments |= self._pictures(pictured, before, new)
            merging = RowMerge()
        cache, over_pages = self._cache(form, batch, before, new)
        with over_pages, merging:
            logits: Tensor = self._model(
                input_ids=ids,
                past_key_values=cache,
                use_cache=True,
                **arguments,
            ).logits
        if isinstance(cache, TracedCache):
            cache.let_go()
        return logits[:, -1] if graph else logits[:, -1].float()

    def _pictures(self, rows: int, before: int, new: int) -> dict[str, Any]:
        """What the engine tells the model of a chunk whose first tokens stand for images."""
        with self._mode:
            features = torch.empty(rows, self._model.config.get_text_config().hidden_size, dtype=self._dtype)
        told: dict[str, Any] = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}
        if "token_type_ids" in self._accepted:
            types = torch.zeros((1, before + new), dtype=torch.long)
            types[:, before : before + rows] = 1
            told["token_type_ids"] = types
        return told

    def _cache(
        self, form: PageFormat | Cache | None, batch: int, before: int, new: int
    ) -> tuple[Cache, contextlib.AbstractContextManager[None]]:
        config = self._model.config
        if not isinstance(form, PageFormat):
            return DynamicCache(config=config) if form is None else form, contextlib.nullcontext()
        layers = config.get_text_config().num_hidden_layers
        traced = TracedCache(form, self._kind, batch, before, new, layers, ours=bool(self._configs))
        return traced, paged(self._configs, traced) if self._configs else contextlib.nullcontext()

    @contextlib.contextmanager
    def _stepping(self, *, every_slice: bool = False) -> Iterator[Recorder]:
        """Record steps as the engine runs them.

        Args:
            every_slice: let long chunks go through feed-forward layers in all their slices, not in one for all of them:
                the same blocks, once more, for an allocator that is followed to the end.
        """
        replaced: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = list(without_weights(self._model, self._kind))
        if self._lean:
            replaced += [(module, _sliced(module, every_slice)) for module in feed_forwards(self._model)]
            replaced += [(module, _one_kernel) for module in rms_norms(self._model) if type(module) in self._fused]
        for module, forward in replaced:
            module.__dict__["forward"] = forward
        try:
            with recording(self._mode, self._model, self._kind) as recorder:
                yield recorder
        finally:
            for module, _ in replaced:
                module.__dict__.pop("forward", None)


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with so many layers in the decoder and in each encoder."""
    short = copy.deepcopy(config)
    parts = [short, *(getattr(short, name) for name in short.sub_configs if getattr(short, name, None) is not None)]
    for part in parts:
        for name in _DEPTHS:
            depth = getattr(part, name, None)
            if not isinstance(depth, int) or depth <= layers:
                continue
            for key, value in list(vars(part).items()):
                if isinstance(value, list) and len(value) == depth:
                    setattr(part, key, value[:layers])
            setattr(part, name, layers)
    return short


def _sliced(module: nn.Module, every_slice: bool) -> Callable[[Tensor], Tensor]:
    """What the slices of a long chunk allocate: all of them, or the first, as which the others are."""
    forward = type(module).forward.__get__(module)

    def run(hidden: Tensor) -> Tensor:
        if hidden.shape[-2] <= FEED_FORWARD_TOKENS:
            return forward(hidden)  # type: ignore[no-any-return]
        result = torch.empty_like(hidden)
        end = hidden.shape[-2] if every_slice else FEED_FORWARD_TOKENS
        for start in range(0, end, FEED_FORWARD_TOKENS):
            stop = start + FEED_FORWARD_TOKENS
            result[..., start:stop, :] = forward(hidden[..., start:stop, :])
        return result

    return run


def _one_kernel(hidden: Tensor) -> Tensor:
    return torch.empty_like(hidden.contiguous())


def _fused_norms(model: Any) -> set[type[nn.Module]]:
    """The classes of norms that are what their name says: one kernel stands in for them."""
    classes = {type(module): module for module in rms_norms(model) if getattr(module, "weight", None) is not None}
    return {cls for cls, module in classes.items() if _is_rms_norm(module)}


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    weight, epsilon = norm_of(module)
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    values = torch.linspace(0.5, 1.5, weight.shape[-1])
    norm_of(probe)[0].copy_(values)
    given = torch.linspace(-1, 2, weight.shape[-1])[None]
    expected = values * given * torch.rsqrt(given.pow(2).mean(-1, keepdim=True) + epsilon)
    try:
        return bool(torch.allclose(probe(given), expected, atol=1e-4))
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return False
