"""What one micro-batch of training allocates: the model's own code, forward and backward, on tensors without data."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from autoglm_lab.memory.planning.recorder import Recorder, flash, without_data
from autoglm_lab.memory.planning.tape import GRAIN, Tape
from autoglm_lab.memory.planning.traced_model import shortened
from autoglm_lab.memory.planning.training_load import TrainingLoad
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.chunked_loss import next_token_loss
from autoglm_lab.models.decoder_layers import core_of, decoder_layers, linear_layers
from autoglm_lab.models.precision import convert
from autoglm_lab.models.quantized_linear import QuantizedEmbedding, QuantizedLinear
from autoglm_lab.models.quantized_products import slice_rows
from autoglm_lab.models.recomputed_layer import recomputing
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.schedule import LEAST_BYTES


@dataclass(frozen=True)
class TrainingTape:
    """One micro-batch of a model with few layers. Gradients, which are made in it, count in its tape alone.

    Attributes:
        tape: forward, loss and backward; what it does not free are the gradients.
        kept: bytes when the forward pass is over.
        large: bytes of these in tensors that may go to the host.
        loss: the most while the loss is computed.
        top: the most of the backward pass.
        tail: the most once one layer's activations are all that is left of it.
    """

    tape: Tape
    kept: int
    large: int
    loss: int
    top: int
    tail: int


def trace(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    kind: Literal["cuda", "cpu"],
    layers: int,
    load: TrainingLoad,
    *,
    micro_batch: int,
    loss_chunk: int,
    recompute: bool = False,
    precisions: Mapping[str, str] | None = None,
) -> TrainingTape:
    """Record a micro-batch of dialogues that are equally long, and all of whose tokens have labels.

    Args:
        recompute: every layer keeps its input alone and runs again.
        precisions: of the weights, by module (`precision.convert`).

    Raises:
        LoadError, RuntimeError: the model's code cannot be run without data.
    """
    model: Any = skeleton(shortened(config, layers), dtype)
    convert(model, precisions or {})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_data(model, mode)
    _without_codes(model, kind, mode)
    learning = _learning(model, load, mode)
    recorder = Recorder(mode, model)
    recorder.ignore(*learning)
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode(mode=False), torch.enable_grad(), _attention(kind), recorder:
            with _computing_again(model) if recompute else contextlib.nullcontext():
                marks = _run(model, dtype, recorder, load.tokens, micro_batch, loss_chunk)
            tape = recorder.tape
    finally:
        if collects:
            gc.enable()
    return _told(tape, marks, layers)


def trace_loss(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    kind: Literal["cuda", "cpu"],
    rows: int,
    chunk: int,
    *,
    precisions: Mapping[str, str] | None = None,
) -> Tape:
    """Record the loss of ``rows`` tokens by slices of ``chunk``, without the decoder's output.

    Raises:
        LoadError, RuntimeError: the model's code cannot be run without data.
    """
    model: Any = skeleton(shortened(config, 1), dtype)
    convert(model, precisions or {})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_data(model, mode)
    _without_codes(model, kind, mode)
    core = core_of(model)
    assert core is not None
    with mode:
        hidden = torch.empty(1, rows + 1, int(config.get_text_config().hidden_size), dtype=dtype, requires_grad=True)
    labels = torch.zeros(1, rows + 1, dtype=torch.long)
    recorder = Recorder(mode, model)
    recorder.ignore(hidden, labels)
    with torch.inference_mode(mode=False), torch.enable_grad(), recorder:
        loss = next_token_loss(hidden, labels, core[1], chunk=chunk, count=rows)
        tape = recorder.tape
    del loss
    return tape


def _run(
    model: Any, dtype: torch.dtype, recorder: Recorder, tokens: int, micro_batch: int, loss_chunk: int
) -> tuple[int, int]:
    """A step as training makes it. Returns how many blocks had come and gone before the loss, and before backward."""
    given = {name: torch.ones(micro_batch, tokens, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    if getattr(model.config, "bidirectional_prompt", False):
        given["block_sequence_ids"] = torch.zeros_like(given["input_ids"])
    labels = torch.zeros_like(given["input_ids"])
    half = torch.autocast("cpu", dtype) if dtype in (torch.bfloat16, torch.float16) else contextlib.nullcontext()
    core = core_of(model)
    with half:
        if core is not None:
            hidden = core[0](**given, use_cache=False, return_dict=True).last_hidden_state
        else:
            hidden = model(**given, use_cache=False, return_dict=True).logits
    before = len(recorder.tape.order)
    if core is not None:
        loss = next_token_loss(hidden, labels, core[1], chunk=loss_chunk, count=labels.numel())
    else:
        flat = hidden[:, :-1].flatten(0, 1).float()
        loss = functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum")
    del hidden
    after = len(recorder.tape.order)
    loss.backward()
    return before, after


@contextlib.contextmanager
def _computing_again(model: Any) -> Iterator[None]:
    """As training lets its layers run again."""
    layers = decoder_layers(model)
    for layer in layers:
        layer.__dict__["forward"] = recomputing(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _told(tape: Tape, marks: tuple[int, int], layers: int) -> TrainingTape:
    sizes = -(-np.asarray(tape.sizes, np.int64) // GRAIN) * GRAIN
    sizes[sorted(set(range(len(sizes))) - {~at for at in tape.order if at < 0})] = 0  # gradients
    live = np.cumsum([0, *(sizes[at] if at >= 0 else -sizes[~at] for at in tape.order)])
    before, after = marks
    held: Counter[int] = Counter()
    for at in tape.order[:before]:
        held[at if at >= 0 else ~at] += 1 if at >= 0 else -1
    large = sum(int(sizes[at]) for at, count in held.items() if count and tape.sizes[at] >= LEAST_BYTES)
    backward = live[after:]
    near_end = np.nonzero(backward <= live[before] // layers)[0]
    tail = backward[near_end[0] :].max() if len(near_end) else backward[-1]
    loss = live[before : after + 1].max()
    return TrainingTape(tape, int(live[before]), large, int(loss), int(backward.max()), int(tail))


def _learning(model: Any, load: TrainingLoad, mode: FakeTensorMode) -> list[nn.Parameter]:
    """What learns."""
    if load.method == "full":
        names = {name for spec in anatomy(model) if spec.name == "text" for name in spec.tensors}
        learning = [parameter for name, parameter in model.named_parameters() if name in names]
    else:
        learning = [one for name in linear_layers(model) for one in _adapted(model.get_submodule(name), load, mode)]
    for parameter in learning:
        parameter.requires_grad_(True)
    return learning


def _adapted(linear: nn.Linear, load: TrainingLoad, mode: FakeTensorMode) -> list[nn.Parameter]:
    """Put low-rank matrices in float32 on a layer, computed as peft computes them."""
    with mode:
        down = nn.Parameter(torch.empty(load.rank, linear.in_features, dtype=torch.float32))
        up = nn.Parameter(torch.empty(linear.out_features, load.rank, dtype=torch.float32))
    plain: Callable[[Tensor], Tensor] = linear.__dict__.get("forward") or type(linear).forward.__get__(linear)

    def forward(hidden: Tensor) -> Tensor:
        result = plain(hidden)
        given = hidden.to(down.dtype)
        return (result + functional.linear(functional.linear(given, down), up) * 2.0).to(result.dtype)

    linear.__dict__["forward"] = forward
    return [down, up]


def _without_codes(model: nn.Module, kind: Literal["cuda", "cpu"], mode: FakeTensorMode) -> None:
    """Quantised weights without data. On a CPU the layers' own code tells what decoding allocates; CUDA's kernels are
    stood in for.
    """
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            with mode:
                layer.packed = torch.empty(layer.packed.numel(), dtype=torch.uint8)
        if isinstance(layer, QuantizedLinear) and kind == "cuda":
            layer.__dict__["forward"] = _decoding(layer)


def _decoding(layer: QuantizedLinear) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        result: Tensor = _Decoded.apply(hidden.reshape(-1, layer.in_features), layer)  # type: ignore[no-untyped-call]
        if layer.bias is not None:
            result = result + layer.bias
        return result.view(*hidden.shape[:-1], layer.out_features)

    return forward


class _Decoded(torch.autograd.Function):
    """What a product with a quantised weight allocates on CUDA, there and back, without numbers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        step = min(layer.out_features, slice_rows(layer.form, rows.dtype))
        result = rows.new_empty(rows.shape[0], layer.out_features)
        decoded = rows.new_empty(step, layer.in_features)
        part = rows.new_empty(rows.shape[0], step) if step < layer.out_features else None
        del decoded, part
        return result

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        layer: QuantizedLinear = ctx.layer
        result = slope.new_empty(slope.shape[0], layer.in_features)
        decoded = slope.new_empty(min(layer.out_features, slice_rows(layer.form, slope.dtype)), layer.in_features)
        del decoded
        return result, None


@contextlib.contextmanager
def _attention(kind: Literal["cuda", "cpu"]) -> Iterator[None]:
    """On a CPU the kernel itself tells what it allocates; CUDA's is stood in for."""
    with _CudaAttention() if kind == "cuda" else contextlib.nullcontext():
        yield


class _CudaAttention(TorchFunctionMode):
    """Half precision without a mask is FlashAttention; with one, its memory-efficient sibling, which keeps the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
    del rest, named
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = (one.to(dtype) for one in (query, key, value))
    result: Tensor = _Flash.apply(query, key, value)  # type: ignore[no-untyped-call]
    return result


class _Flash(torch.autograd.Function):
    """What FlashAttention keeps and allocates, without numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = flash(query, value)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        rows = -(-query.shape[-2] // 128) * 128
        sums = query.new_empty(*query.shape[:2], rows, dtype=torch.float32)
        summed = query.new_empty(*query.shape[:2], rows, -(-query.shape[-1] // 32) * 32, dtype=torch.float32)
        # Where queries share a key, its gradient is first one for each of them.
        spread = [torch.empty_like(query) for _ in range(2)] if query.shape[1] != key.shape[1] else []
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del slope, sums, summed, spread
        return found
