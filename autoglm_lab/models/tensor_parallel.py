"""How a model is cut over several devices that compute each of its layers together (tensor parallel).

transformers' own plan of a model (``tp_plan``) says which layers are cut. A rank's model is then the same architecture
with fewer heads and narrower layers, so that slabs, files, pages and plans need not know of it: its configuration is
marked, and every skeleton and page made from it is the rank's.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from autoglm_lab.errors import LoadError
from autoglm_lab.models.anatomy import anatomy, named_tensors

Style = Literal["columns", "rows", "gathered", "embedding"]
_STYLES: dict[str, Style | None] = {
    "colwise": "columns",
    "packed_colwise": "columns",
    "colwise_gather_output": "gathered",
    "colwise_rep": "gathered",
    "rowwise": "rows",
    "rowwise_split_input": "rows",
    "embedding_rowwise": "embedding",
    "replicated_with_grad_allreduce": None,
}
_MARK = "autoglm_lab_rank"
_KEYS = ("k_proj", "v_proj")
FIRST_ONLY = ("vision", "audio", "projector")
"""Modules that are whole on rank 0 and on no other: the others get what they gave."""


@dataclass(frozen=True)
class Cut:
    """Which part of a tensor a rank holds.

    Attributes:
        rows: spans ``(first, end)`` of the first dimension, one after another.
        columns: the span of the last dimension; None: all of it.
    """

    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of what is held of a tensor of this shape."""
        count = sum(end - first for first, end in self.rows)
        if self.columns is None:
            return (count, *whole[1:])
        return (count, *whole[1:-1], self.columns[1] - self.columns[0])


@dataclass(frozen=True)
class CutLayer:
    """One layer of a rank.

    Attributes:
        path: in the model.
        style: ``columns``: it gives a part of the output; ``gathered``: the parts are put together again; ``rows``: it
            reads a part of the input, and the ranks' outputs are added up; ``embedding``: it knows a part of the ids.
        cuts: by parameter; a ``bias`` that is added to a sum is not cut, and belongs to the first rank.
    """

    path: str
    style: Style
    cuts: dict[str, Cut]


@dataclass(frozen=True)
class Share:
    """What one of several ranks holds of a model.

    Attributes:
        layers: those that are cut; all others are whole on every rank.
        kv_heads: heads of keys and values that this rank computes and keeps, of one layer.
        note: what a person should know, in a sentence; empty: nothing.
    """

    ranks: int
    rank: int
    layers: tuple[CutLayer, ...]
    kv_heads: int
    note: str = ""


def mark(config: PreTrainedConfig, ranks: int, rank: int) -> None:
    """Let everything that is made from ``config`` be one rank's."""
    setattr(config.get_text_config(), _MARK, {"ranks": ranks, "rank": rank})


def marked(config: PreTrainedConfig) -> tuple[int, int] | None:
    """``(ranks, rank)`` of a configuration that was marked; None: the whole model."""
    found = getattr(config.get_text_config(), _MARK, None)
    return None if found is None else (int(found["ranks"]), int(found["rank"]))


def local_kv_heads(config: PreTrainedConfig, heads: int) -> int:
    """Heads of keys and values that are kept here, of a model with ``heads``: at least one, which several may share."""
    found = marked(config)
    return heads if found is None else max(1, heads // found[0])


def possible_ranks(model: nn.Module, most: int = 16) -> tuple[int, ...]:
    """Into how many ranks a model can be cut, up to ``most``."""
    found = []
    for ranks in range(2, most + 1):
        with contextlib.suppress(LoadError, _UnevenError):
            _share(model, ranks, 0)
            found.append(ranks)
    return tuple(found)


def share_of(model: nn.Module, ranks: int, rank: int) -> Share:
    """What ``rank`` of ``ranks`` holds. ``model`` is whole; it may be on the meta device.

    With fewer heads of keys and values than ranks, each is computed and kept by several ranks.

    Raises:
        LoadError: transformers has no plan for it, or it cannot be cut into so many; the message says what can.
    """
    try:
        return _share(model, ranks, rank)
    except _UnevenError as error:
        known = ", ".join(map(str, possible_ranks(model))) or "none"
        raise LoadError(f"{error}, which {ranks} ranks cannot share evenly; ranks that can: {known}") from None


class _UnevenError(Exception):
    """Something of the model that the ranks cannot share."""


def _share(model: nn.Module, ranks: int, rank: int) -> Share:
    styles = dict(_matched(model, getattr(model, "tp_plan", None) or {}))
    if not any(path.endswith("q_proj") for path in styles):
        raise LoadError(
            f"{type(model).__name__} cannot be cut over several devices: transformers has no plan for its attention; "
            f"{_INSTEAD}"
        )
    layers = [_layer(model, path, styles, ranks, rank) for path in styles]
    keys = next(layer for layer in layers if layer.path.endswith("k_proj"))
    size = _head_dim(model, keys.path)
    heads, kept = (rows // size for rows in (_rows(model, keys.path), keys.cuts["weight"].shape((0, 0))[0]))
    note = ""
    if heads < ranks:
        note = f"{heads} heads of keys and values over {ranks} ranks: each is computed and kept by {ranks // heads}"
    return Share(ranks, rank, tuple(layers), kept, note)


def shares_nbytes(model: nn.Module, ranks: int) -> tuple[dict[str, int], ...]:
    """Bytes of every module on each rank, by name; encoders and what joins them to the text are on the first alone."""
    tensors = dict(named_tensors(model))
    found = []
    for rank in range(ranks):
        cuts = {
            f"{layer.path}.{name}": cut
            for layer in share_of(model, ranks, rank).layers
            for name, cut in layer.cuts.items()
        }
        nbytes = {}
        for spec in anatomy(model):
            if rank and spec.name in FIRST_ONLY:
                continue
            shapes = {name: tuple(tensors[name].shape) for name in spec.tensors}
            held = {name: cuts[name].shape(shape) if name in cuts else shape for name, shape in shapes.items()}
            nbytes[spec.name] = sum(torch.Size(shape).numel() * tensors[name].itemsize for name, shape in held.items())
        found.append(nbytes)
    return tuple(found)


def narrow(model: nn.Module, share: Share) -> None:
    """Make a whole model a rank's: its cut parameters are on the meta device then, ties stay."""
    replaced: dict[int, nn.Parameter] = {}
    for layer in share.layers:
        module: Any = model.get_submodule(layer.path)
        for name, cut in layer.cuts.items():
            whole: nn.Parameter = getattr(module, name)
            if id(whole) not in replaced:
                replaced[id(whole)] = _narrowed(whole, cut)
            setattr(module, name, replaced[id(whole)])
        rows, columns = module.weight.shape
        if isinstance(module, nn.Embedding):
            module.num_embeddings, module.padding_idx = rows, None
        else:
            module.out_features, module.in_features = rows, columns
    for path in {layer.path.rpartition(".")[0] for layer in share.layers if layer.path.endswith("q_proj")}:
        _count_heads(model.get_submodule(path))


def encoders_apart(model: Any) -> bool:
    """Whether encoders can be on one rank alone: the others get what they gave."""
    names = {spec.name for spec in anatomy(model)}
    return not names & {"vision", "audio"} or "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def _matched(model: nn.Module, plan: dict[str, str]) -> Iterator[tuple[str, str]]:
    for path, module in model.named_modules():
        style = plan.get(re.sub(r"\d+", "*", path))
        if style is None:
            continue
        if style not in _STYLES or (_STYLES[style] and not isinstance(module, nn.Linear | nn.Embedding)):
            raise LoadError(f"{path} is cut as {style!r} in transformers' plan, which is not known here; {_INSTEAD}")
        if _STYLES[style] is not None:
            yield path, style


_INSTEAD = "leave tensor_parallel out, or keep layers on the host (placement.host_bytes)"


def _layer(model: nn.Module, path: str, styles: dict[str, str], ranks: int, rank: int) -> CutLayer:
    module: Any = model.get_submodule(path)
    parent, _, last = path.rpartition(".")
    style = _STYLES[styles[path]]
    assert style is not None
    rows, columns = module.weight.shape
    if style == "rows":
        _even(path, columns, ranks)
        return CutLayer(path, style, {"weight": Cut(((0, rows),), _span(columns, ranks, rank))})
    spans: tuple[tuple[int, int], ...]
    pair = f"{parent}.down_proj"
    if styles[path] == "packed_colwise" or (last == "gate_up_proj" and rows == 2 * _width(model, pair, styles)):
        # Gate and up lie behind one another: a part of each, so that the layer after it reads what this one gives.
        _even(path, rows // 2, ranks)
        first, end = _span(rows // 2, ranks, rank)
        spans, style = ((first, end), (first + rows // 2, end + rows // 2)), "columns"
    elif last in ("q_proj", *_KEYS):
        spans = (_heads_span(model, path, rows, ranks, rank),)
    else:
        _even(path, rows, ranks)
        spans = (_span(rows, ranks, rank),)
    cuts = {"weight": Cut(spans)}
    if getattr(module, "bias", None) is not None:
        cuts["bias"] = Cut(spans)
    return CutLayer(path, style, cuts)


def _width(model: nn.Module, path: str, styles: dict[str, str]) -> int:
    """Columns of a layer that reads a part of its input; 0: it is not one."""
    cut = _STYLES.get(styles.get(path, ""))
    return _weight(model, path).shape[1] if cut == "rows" else 0


def _heads_span(model: nn.Module, path: str, rows: int, ranks: int, rank: int) -> tuple[int, int]:
    size = _head_dim(model, path)
    heads = rows // size
    if heads % ranks == 0:
        first, end = _span(heads, ranks, rank)
    elif path.endswith(_KEYS) and ranks % heads == 0:
        first = rank * heads // ranks
        end = first + 1
    else:
        raise _UnevenError(f"{path} has {heads} heads")
    return first * size, end * size


def _head_dim(model: nn.Module, path: str) -> int:
    attention = model.get_submodule(path.rpartition(".")[0])
    size = getattr(attention, "head_dim", None)
    if not isinstance(size, int):
        raise LoadError(f"{path} cannot be cut into heads: its attention does not say how wide one is; {_INSTEAD}")
    return size


def _even(path: str, width: int, ranks: int) -> None:
    if width % ranks:
        raise _UnevenError(f"{path} has a width of {width:,}")


def _span(width: int, ranks: int, rank: int) -> tuple[int, int]:
    each = width // ranks
    return rank * each, (rank + 1) * each


def _weight(model: nn.Module, path: str) -> Tensor:
    weight: Any = model.get_submodule(path).weight
    return weight  # type: ignore[no-any-return]


def _rows(model: nn.Module, path: str) -> int:
    return _weight(model, path).shape[0]


def _narrowed(whole: nn.Parameter, cut: Cut) -> nn.Parameter:
    empty = torch.empty(cut.shape(tuple(whole.shape)), dtype=whole.dtype, device="meta")
    made = nn.Parameter(empty, requires_grad=whole.requires_grad)
    made.__dict__.update(whole.__dict__)
    return made


def _count_heads(attention: Any) -> None:
    """What an attention says of its own heads is the rank's now."""
    size = attention.head_dim
    queries, keys = attention.q_proj.out_features // size, attention.k_proj.out_features // size
    counts = {"num_heads": queries, "num_key_value_heads": keys, "num_key_value_groups": queries // keys}
    for name, count in counts.items():
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, count)
