"""Layers with weights in 8 or 4 bits, or half of them: they stand where `nn.Linear` and `nn.Embedding` stood."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from autoglm_lab.models.quantized_products import FEW_ROWS, Packed, product, product_backward, slice_rows
from autoglm_lab.models.weight_format import WeightFormat


class QuantizedLinear(nn.Linear):
    """``inputs @ weight.T + bias`` with a weight that is never there as a whole in another precision.

    Args:
        form: of the weight ``[out_features, in_features]``.
        packed: ``uint8 [form.nbytes]``, on any device, the meta device included.
        bias: ``[out_features]``, or None.
        dtype: what ``weight`` is read as.
    """

    packed: Tensor

    def __init__(self, form: Packed, packed: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # a linear layer would make a weight
        self.in_features, self.out_features = form.columns, form.rows
        self.form, self.dtype = form, dtype
        self.register_buffer("packed", packed)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight in ``dtype``, made anew: for code that looks at it. `forward` does without."""
        return _whole(self.form, self.packed, self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and inputs.requires_grad:
            result: Tensor = _Product.apply(rows, self.packed, self.form)  # type: ignore[no-untyped-call]
        else:
            result = product(rows, self.packed, self.form)
        if self.bias is not None:
            result = result + self.bias
        return result.view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.form.precision}"


class QuantizedEmbedding(nn.Embedding):
    """Rows of a table that is kept quantised; only those that are looked up are decoded.

    Args:
        form: of the table ``[num_embeddings, embedding_dim]``.
        packed: ``uint8 [form.nbytes]``; a tied head shares it.
        dtype: of what is looked up.
    """

    packed: Tensor

    def __init__(self, form: WeightFormat, packed: Tensor, dtype: torch.dtype, padding_idx: int | None) -> None:
        nn.Module.__init__(self)  # an embedding would make a weight
        self.num_embeddings, self.embedding_dim, self.padding_idx = form.rows, form.columns, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.form, self.dtype = form, dtype
        self.register_buffer("packed", packed)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table in ``dtype``, made anew: for code that looks at it. `forward` does without."""
        return _whole(self.form, self.packed, self.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that embeddings have
        ids = input.reshape(-1)
        codes, scales = self.form.codes(self.packed)[ids], self.form.scales(self.packed)[ids]
        return self.form.decode_rows(codes, scales, self.dtype).view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.form.precision}"


class _Product(torch.autograd.Function):
    """The product for training beside frozen weights: the way back decodes them again instead of keeping them."""

    @staticmethod
    def forward(context: Any, rows: Tensor, packed: Tensor, form: Packed) -> Tensor:
        context.save_for_backward(packed)
        context.form = form
        return product(rows, packed, form)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = context.saved_tensors
        return product_backward(gradient, packed, context.form), None, None


_without_numbers: ContextVar[bool] = ContextVar("without_numbers", default=False)


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Meanwhile ``weight`` of a quantised layer has a shape, a dtype and a device, but no numbers: nothing decodes."""
    before = _without_numbers.set(True)
    try:
        yield
    finally:
        _without_numbers.reset(before)


def _whole(form: Packed, packed: Tensor, dtype: torch.dtype) -> Tensor:
    if _without_numbers.get():
        return packed.new_zeros((), dtype=dtype).expand(form.rows, form.columns)
    if packed.is_meta:
        return torch.empty(form.rows, form.columns, dtype=dtype, device="meta")
    return form.decode(packed, 0, form.rows, dtype)


def without_weights(model: nn.Module, kind: str) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """What the quantised layers of a model allocate on ``cuda`` or ``cpu``, as forwards that compute no numbers.

    Args:
        model: its parameters are of the kind that has no data, and so are the results.
    """
    parameter = next(model.parameters(), None)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            yield layer, _multiplies(layer, kind, parameter)
        elif isinstance(layer, QuantizedEmbedding):
            yield layer, _looks_up(layer, parameter)


def _multiplies(layer: QuantizedLinear, kind: str, like: Tensor | None) -> Callable[[Tensor], Tensor]:
    def run(inputs: Tensor) -> Tensor:
        empty = (inputs if like is None else like).new_empty
        rows, dtype = inputs.numel() // layer.in_features, inputs.dtype
        result = empty(*inputs.shape[:-1], layer.out_features, dtype=dtype)
        if kind == "cpu" or rows > FEW_ROWS or layer.form.precision == "nf4":
            step = min(layer.out_features, slice_rows(layer.form, dtype))
            decoded = empty(step, layer.in_features, dtype=dtype)
            part = empty(rows, step, dtype=dtype) if step < layer.out_features else None
            del decoded, part
        return result if layer.bias is None else result + layer.bias

    return run


def _looks_up(layer: QuantizedEmbedding, like: Tensor | None) -> Callable[[Tensor], Tensor]:
    def run(ids: Tensor) -> Tensor:
        return (ids if like is None else like).new_empty(*ids.shape, layer.embedding_dim, dtype=layer.dtype)

    return run
