"""Where the values of each tensor of a model come from: a file, this process, or nowhere (made up).

Files are matched to a model by transformers' own rules; what only transformers can convert, it loads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from autoglm_lab.errors import LoadError
from autoglm_lab.models.anatomy import named_tensors
from autoglm_lab.models.checkpoint import FileTensor
from autoglm_lab.models.skeleton import model_class
from autoglm_lab.models.sparse_format import SparseFormat
from autoglm_lab.models.weight_format import WeightFormat


@dataclass(frozen=True)
class DummyTensor:
    """A tensor that is made up: equal for equal seeds, on every device.

    Attributes:
        fill: ``normal`` around 0 with ``std``, ``ones`` or ``zeros``.
        seed: of this tensor alone.
    """

    fill: Literal["normal", "ones", "zeros"]
    std: float
    seed: int


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that this process already holds."""

    tensor: Tensor


@dataclass(frozen=True)
class CutTensor:
    """A part of a tensor: what one of several ranks holds of it.

    Attributes:
        source: of the whole.
        shape: of the whole.
        rows: spans ``(first, end)`` of its first dimension.
        columns: the span of its last one; None: all of it.
    """

    source: FileTensor | DummyTensor | HeldTensor
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None


@dataclass(frozen=True)
class PackedTensor:
    """A weight that is quantised, or pruned, while it comes.

    Attributes:
        name: of the weight in the model as it was made.
        form: how it lies in memory.
        source: where its numbers come from.
    """

    name: str
    form: WeightFormat | SparseFormat
    source: FileTensor | DummyTensor | HeldTensor | CutTensor


Source = FileTensor | DummyTensor | HeldTensor | CutTensor | PackedTensor


def dummy_sources(model: PreTrainedModel, config: PreTrainedConfig, seed: int) -> dict[str, Source]:
    """Made-up values for every parameter; buffers keep the values that the model computed."""
    std = float(getattr(config.get_text_config(), "initializer_range", 0.02) or 0.02)
    sources: dict[str, Source] = {}
    for index, (name, tensor) in enumerate(named_tensors(model)):
        if not tensor.is_meta:  # a buffer: its computed value is the true one
            sources[name] = HeldTensor(tensor)
            continue
        last = name.rsplit(".", 1)[-1]
        fill: Literal["normal", "ones", "zeros"] = "normal"
        if last.endswith("bias"):
            fill = "zeros"
        elif tensor.ndim == 1 and last.endswith("weight"):
            fill = "ones"
        sources[name] = DummyTensor(fill, std, seed * 1_000_003 + index)
    return sources


def file_sources(
    model: PreTrainedModel, files: dict[str, FileTensor], folder: Path, dtype: torch.dtype
) -> tuple[dict[str, Source], PreTrainedModel]:
    """Tensors by the model's names; the model is another one where only transformers could convert the names.

    Args:
        files: as `checkpoint.read_folder` gives them; empty: pickled weights, which transformers reads.
        dtype: of the floating-point parameters.

    Raises:
        LoadError: tensors are missing, unexpected or of another shape; the message names them.
    """
    if not files:
        return _converted(model, folder, dtype, pickled=True)
    named = _renamed(model, files)
    sources: dict[str, Source] = {}
    aliases = _aliases(model)
    used: set[str] = set()
    missing, misshapen = [], []
    ignored_missing = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    for name, tensor in named_tensors(model):
        spellings = [alias for alias in aliases.get(id(tensor), [name]) if alias in named]
        used.update(spellings)
        if not spellings:
            if tensor.is_meta and not _matches(ignored_missing, name):
                missing.append(name)
            else:
                sources[name] = HeldTensor(tensor)
            continue
        stored = named[spellings[0]]
        if any(not _same_bytes(stored, named[other]) for other in spellings[1:]):
            return _converted(model, folder, dtype)
        if stored.shape != tuple(tensor.shape):
            misshapen.append(f"{name} is {list(stored.shape)} in the file, {list(tensor.shape)} in the model")
        sources[name] = stored
    unexpected = [name for name in named if name not in used and not _ignorable(model, name)]
    if misshapen and not missing and not unexpected:
        raise LoadError(f"the tensors in {folder} do not fit {type(model).__name__}: {'; '.join(misshapen[:4])}")
    if missing or unexpected:
        return _converted(model, folder, dtype)
    return sources, model


def _renamed(model: PreTrainedModel, files: dict[str, FileTensor]) -> dict[str, FileTensor]:
    """The files' tensors under the model's names, as far as transformers' own renaming rules go."""
    expected = model.state_dict()
    if all(name in expected for name in files):
        return files
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # these rules are transformers' own business and may move
        return files
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    named: dict[str, FileTensor] = {}
    for name in sorted(files):
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        named[name if converter is not None else renamed] = files[name]
    return named


def _converted(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, *, pickled: bool = False
) -> tuple[dict[str, Source], PreTrainedModel]:
    """Let transformers load the folder, and take over what it made: it knows conversions that are no renaming."""
    cls = model_class(model.config)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": not pickled, "output_loading_info": True}
    try:
        outcome: Any = cls.from_pretrained(folder, dtype=dtype, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise LoadError(f"the weights in {folder} do not fit {cls.__name__}: {error}") from None
    loaded, report = outcome
    problems = {
        kind: sorted(map(str, report.get(f"{kind}_keys", ()))) for kind in ("missing", "unexpected", "mismatched")
    }
    told = [f"{len(names)} {kind}: {', '.join(names[:4])}" for kind, names in problems.items() if names]
    if told:
        raise LoadError(f"the tensors in {folder} do not fit {cls.__name__} ({'; '.join(told)})")
    return {name: HeldTensor(tensor.detach()) for name, tensor in named_tensors(loaded)}, loaded


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return aliases


def _same_bytes(one: FileTensor, other: FileTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 24
    with one.path.open("rb") as left, other.path.open("rb") as right:
        left.seek(one.offset)
        right.seek(other.offset)
        for start in range(0, one.nbytes, step):
            count = min(step, one.nbytes - start)
            if left.read(count) != right.read(count):
                return False
    return True


def _ignorable(model: PreTrainedModel, name: str) -> bool:
    """Leftovers of older versions, which transformers drops too: computed buffers, and what a class declares."""
    declared = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return _matches((*declared, r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"), name)


def _matches(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
