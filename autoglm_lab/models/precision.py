"""The precision of each module's weights: what is swapped in a model before they come, and the bytes of each.

A module in ``int8``, ``int4`` or ``nf4`` keeps its linear layers (and, always in int8, its embeddings) quantised; the
rest of it (norms, biases, convolutions) stays as it was. One in ``2:4`` keeps of its linear layers two of every four
numbers, as they were. A module in a floating-point precision has its tensors in that dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from autoglm_lab.errors import LoadError, PolicyError, TrainingError
from autoglm_lab.models.anatomy import ModuleSpec, anatomy, named_tensors
from autoglm_lab.models.loading import Resolved
from autoglm_lab.models.module_dtype import join_dtypes
from autoglm_lab.models.quantized_linear import QuantizedEmbedding, QuantizedLinear
from autoglm_lab.models.quantized_products import Packed
from autoglm_lab.models.sparse_format import Sparse, SparseFormat
from autoglm_lab.models.tensor_sources import PackedTensor
from autoglm_lab.models.weight_format import Quantized, WeightFormat

Precision = Literal["model", "float32", "bfloat16", "float16", "int8", "int4", "nf4", "2:4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIXED: dict[str, dict[str, Precision]] = {
    "int8": {"text": "int8", "head": "int8"},
    "int4": {"text": "int4", "head": "int8"},
    "nf4": {"text": "nf4", "head": "int8"},
}
"""What ``quantize="int8"``, ``"int4"`` and ``"nf4"`` stand for: a head is a small share, and the most sensitive."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` made of a model.

    Attributes:
        packed: of each new tensor, by its name: the name of the one that it stands for, and how it lies in memory.
        dtypes: of each tensor that has another dtype now, by its name.
    """

    packed: dict[str, tuple[str, Packed]]
    dtypes: dict[str, torch.dtype]


def keep_in(resolved: Resolved, precisions: Mapping[str, str]) -> None:
    """Let a model whose weights are still to come keep its modules in ``precisions``.

    Raises:
        PolicyError: there is no such module or precision, or the process holds the model already.
        LoadError: the model's layers cannot be kept in that precision.
    """
    if resolved.attached and any(precision != "model" for precision in precisions.values()):
        raise PolicyError(
            "a model that is attached keeps the precision that it has: leave modules.*.precision at 'model', or load "
            "the model from its folder instead"
        )
    made, sources = convert(resolved.model, precisions), resolved.sources
    for name, (old, form) in made.packed.items():
        source = sources.pop(old)
        assert not isinstance(source, PackedTensor)
        sources[name] = PackedTensor(old, form, source)
    text = next((spec for spec in anatomy(resolved.model) if spec.name == "text"), None)
    if text is not None and made.dtypes:
        resolved.dtype = dtype_of(resolved.model, text)


def spelled_out(quantize: str | Mapping[str, str] | None, modules: Collection[str]) -> dict[str, str]:
    """Precisions by module, from what a person wrote: a name of `MIXED` stands for the modules that the model has.

    Raises:
        PolicyError: it is a text, and no name of `MIXED`.
    """
    if not isinstance(quantize, str):
        return dict(quantize or {})
    if quantize not in MIXED:
        raise PolicyError(f"quantize {quantize!r} is none of {', '.join(MIXED)}, nor a precision for each module")
    return {name: precision for name, precision in MIXED[quantize].items() if name in modules}


def convert(model: nn.Module, precisions: Mapping[str, str]) -> Conversion:
    """Swap the layers of ``model`` in place, on the meta device or not. Values are not kept: weights come afterwards.

    Args:
        precisions: by module; modules that are not named, and ``model``, stay as they are.

    Raises:
        PolicyError: there is no such module or precision.
        LoadError: the model's layers cannot be kept in that precision.
    """
    wanted = {name: precision for name, precision in precisions.items() if precision != "model"}
    if not wanted:
        return Conversion({}, {})
    specs = {spec.name: spec for spec in anatomy(model)}
    for name, precision in wanted.items():
        if name not in specs:
            raise PolicyError(f"there is no module {name!r}: this model has {', '.join(specs)}")
        if precision not in PRECISIONS:
            raise PolicyError(f"there is no precision {precision!r}: use {', '.join(PRECISIONS)}")
    if precisions_of(model):
        raise LoadError("this model is converted already: make its skeleton anew")
    own = dtype_of(model, specs.get("text"))
    dtypes: dict[str, torch.dtype] = {}
    packed: dict[str, tuple[str, Packed]] = {}
    for name, precision in wanted.items():
        if precision in FLOATS:
            dtypes |= _cast(model, specs[name], own, FLOATS[precision])
    for name, precision in wanted.items():
        if precision not in FLOATS:
            made = _quantise(model, specs[name], cast("Quantized | Sparse", precision))
            if not made:
                raise LoadError(f"'{name}' has no linear layer that can be kept in {precision}: leave its precision")
            packed |= made
    if dtypes:
        after = anatomy(model)
        text = next((dtype_of(model, spec) for spec in after if spec.name == "text"), own)
        join_dtypes(model, after, text)
    model.__dict__["_lab_precisions"], model.__dict__["_lab_dtype"] = dict(wanted), own
    return Conversion(packed, dtypes)


def precisions_of(model: nn.Module) -> dict[str, Precision]:
    """What `convert` was asked for on this model; empty: nothing."""
    found: dict[str, Precision] = model.__dict__.get("_lab_precisions", {})
    return dict(found)


def check_can_learn(model: nn.Module, modules: Collection[str]) -> None:
    """Raise `TrainingError` where weights of these modules are kept so that they cannot learn."""
    for name, precision in precisions_of(model).items():
        if name in modules and precision not in (*FLOATS, "model"):
            raise TrainingError(
                f"the weights of '{name}' are kept in {precision} and cannot learn themselves: learn adapters on them "
                "(method 'lora'), or load the model in its own precision"
            )


def made_in(model: nn.Module) -> torch.dtype:
    """The dtype that a model was made in, before `convert`."""
    found: torch.dtype | None = model.__dict__.get("_lab_dtype")
    return found or dtype_of(model, next((spec for spec in anatomy(model) if spec.name == "text"), None))


def dtype_of(model: nn.Module, spec: ModuleSpec | None) -> torch.dtype:
    """What a module computes in: the dtype of most of its numbers, those behind quantised weights included.

    Args:
        spec: the module; None: the whole model.
    """
    counts: dict[torch.dtype, int] = {}
    tensors = dict(named_tensors(model))
    for name in tensors if spec is None else spec.tensors:
        path, _, _ = name.rpartition(".")
        holder: Any = model.get_submodule(path)
        quantised = isinstance(holder, QuantizedLinear | QuantizedEmbedding)
        dtype = holder.dtype if quantised else tensors[name].dtype
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + tensors[name].numel()
    return max(counts, key=lambda one: counts[one], default=torch.float32)


def module_nbytes(model: nn.Module, precision: str) -> dict[str, int]:
    """Bytes of every module's tensors if each of them had ``precision``. The model stays as it is.

    Args:
        model: as it was made, without quantised layers.
        precision: one of `PRECISIONS`.
    """
    tensors = dict(named_tensors(model))
    found = {}
    for spec in anatomy(model):
        nbytes = spec.nbytes
        if precision in FLOATS:
            own = dtype_of(model, spec)
            share = FLOATS[precision].itemsize - own.itemsize
            nbytes += sum(tensors[name].numel() * share for name in spec.tensors if tensors[name].dtype == own)
        elif precision != "model":
            for group, form in _groups(model, spec, cast("Quantized | Sparse", precision)):
                nbytes += form.nbytes - _nbytes(group[0][1].weight)
        found[spec.name] = nbytes
    return found


def label(model: nn.Module, name: str) -> tuple[str, int]:
    """What a tensor of the model is kept in, for people (``int4``, ``bfloat16`` …), and how many numbers it holds."""
    path, _, last = name.rpartition(".")
    holder: Any = model.get_submodule(path)
    if isinstance(holder, QuantizedLinear | QuantizedEmbedding) and last == "packed":
        return holder.form.precision, holder.form.rows * holder.form.columns
    tensor: Tensor = getattr(holder, last)
    return str(tensor.dtype).removeprefix("torch."), tensor.numel()


_Holder = tuple[str, nn.Linear | nn.Embedding]


def _quantise(model: nn.Module, spec: ModuleSpec, precision: Quantized | Sparse) -> dict[str, tuple[str, Packed]]:
    made: dict[str, tuple[str, Packed]] = {}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for group, form in _groups(model, spec, precision):
        path, layer = group[0]
        weight = layer.weight
        packed = torch.zeros(1, dtype=torch.uint8).expand(form.nbytes)  # nothing yet: a slab comes in its place
        made[f"{path}.packed"] = first[id(weight)], form
        for place, holder in group:
            model.set_submodule(place, _quantised(holder, form, packed), strict=True)
    return made


def _quantised(holder: nn.Linear | nn.Embedding, form: Packed, packed: Tensor) -> nn.Module:
    dtype = holder.weight.dtype
    made: nn.Module
    if isinstance(holder, nn.Linear):
        made = QuantizedLinear(form, packed, cast("nn.Parameter | None", holder.bias), dtype)
    else:
        assert isinstance(form, WeightFormat)
        made = QuantizedEmbedding(form, packed, dtype, holder.padding_idx)
    return made.train(holder.training)


def _groups(
    model: nn.Module, spec: ModuleSpec, precision: Quantized | Sparse
) -> Iterator[tuple[list[_Holder], Packed]]:
    """Layers of a module that share a weight and can be swapped all of them, and would be smaller; and how they lie."""
    own = set(spec.tensors)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            if names[id(parameter)] in own:
                holders.setdefault(id(parameter), []).append((path, module))
    for key, found in holders.items():
        # A class of its own may use its weight in a way of its own.
        usable = all(type(module) in {nn.Linear, nn.Embedding} and id(module.weight) == key for _, module in found)
        group = cast("list[_Holder]", found)
        if usable and group[0][1].weight.ndim == 2 and group[0][1].weight.is_floating_point():
            form = _form(group, precision)
            if form is not None and form.nbytes < _nbytes(group[0][1].weight) and _looked_up_plainly(group):
                yield group, form


def _looked_up_plainly(group: list[_Holder]) -> bool:
    return all(holder.max_norm is None for _, holder in group if isinstance(holder, nn.Embedding))


def _form(group: list[_Holder], precision: Quantized | Sparse) -> Packed | None:
    """Embeddings are looked up row by row and read once a token: 4 bits would save little and cost much."""
    weight = group[0][1].weight
    rows, columns = weight.shape
    embedded = any(isinstance(holder, nn.Embedding) for _, holder in group)
    if precision == "2:4":
        fitting = SparseFormat.fits(columns) and not embedded
        return SparseFormat(rows, columns, weight.dtype) if fitting else None
    return WeightFormat.of(rows, columns, "int8" if embedded else precision)


def _cast(model: nn.Module, spec: ModuleSpec, own: torch.dtype, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Give a module's parameters another dtype; those that the model keeps in one of their own stay."""
    dtypes, replaced, members = {}, {}, set(spec.tensors)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for last, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            name = names.get(id(parameter))
            if name not in members or parameter.dtype != own or dtype == own:
                continue
            if name not in replaced:
                empty = torch.empty(parameter.shape, dtype=dtype, device="meta")
                replaced[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                dtypes[name] = dtype
            setattr(module, last, replaced[name])
    return dtypes


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
