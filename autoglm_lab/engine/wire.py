"""The engine protocol as JSON: what a server of ours sends, and what a remote engine reads.

Every object is written field by field: bytes are ints, times are seconds, what a machine cannot tell is null. A reader
ignores fields that it does not know, so that either side may be the newer one.

A chat completion says more under `EXTENSION`, which other clients ignore: ``{"event": Event}`` in a chunk while
something happens to the memory, ``{"answer": Answer}`` in the last chunk or in the whole answer.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from autoglm_lab.errors import WireError
from autoglm_lab.memory.events import EventKind
from autoglm_lab.memory.ledger import RowKind
from autoglm_lab.policy import MemoryPolicy

EXTENSION: Final = "autoglm_lab"
"""The key of what is ours in a chat completion."""

Kind = TypeVar("Kind")
# What a newer side may say that this one has no word for.
_NEAREST: Final[dict[Any, str]] = {RowKind: "owner", EventKind: "note"}


def to_wire(value: Any) -> Any:
    """As plain JSON values.

    Args:
        value: a dataclass of the engine protocol (`Ledger`, `Event`, `ModuleInfo`, `ConversationInfo`, `Capabilities`,
            `Answer`, `Plan`, `PageFormat` …), a `MemoryPolicy`, or a list, tuple or mapping of them.

    Returns:
        Dicts, lists, text, numbers, booleans and None. A policy comes with all its settings, not only those that differ
        from the defaults, since the defaults of the other side may differ.

    Raises:
        WireError: something in it has no form as JSON.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, MemoryPolicy):
        return value.model_dump()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_wire(getattr(value, field.name)) for field in fields(value) if field.compare}
    if isinstance(value, Mapping):
        return {str(key): to_wire(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [to_wire(one) for one in value]
    if _is_dtype(type(value)):
        return str(value).removeprefix("torch.")
    raise WireError(f"{type(value).__name__} has no form as JSON: send dataclasses, policies, lists and plain values")


def from_wire(kind: type[Kind], data: Any) -> Kind:
    """What `to_wire` wrote.

    Args:
        kind: a dataclass of the engine protocol, `MemoryPolicy`, or ``tuple[…, ...]`` and ``dict[str, …]`` of them.
        data: parsed JSON.

    Raises:
        WireError: a field is missing or is of another type; the message names it.
        PolicyError: a setting of a policy cannot be.

    Example:
        >>> from autoglm_lab.memory.events import Event
        >>> from_wire(Event, {"time": 0.0, "kind": "woke", "subject": "vision", "nbytes": 5, "new": "ignored"})
        woke vision 5 B
    """
    read: Kind = _read(kind, data, getattr(kind, "__name__", str(kind)))
    return read


def policy_from_wire(data: Any) -> MemoryPolicy:
    """A policy without the settings that this side does not know.

    Raises:
        WireError: it is no mapping.
        PolicyError: a setting cannot be.
    """
    if not isinstance(data, Mapping):
        raise WireError(f"a policy is an object of settings, not {_name(data)}")
    return MemoryPolicy.from_dict(_known(MemoryPolicy, data))


def _read(kind: Any, data: Any, where: str) -> Any:
    reader = _READERS.get(get_origin(kind))
    if reader is not None:
        return reader(kind, data, where)
    if kind is MemoryPolicy:
        return policy_from_wire(data)
    if is_dataclass(kind):
        return _dataclass(kind, data, where)
    if _is_dtype(kind):
        return _dtype(data, where)
    return _plain(kind, data, where)


def _optional(kind: Any, data: Any, where: str) -> Any:
    kinds = get_args(kind)
    if data is None and type(None) in kinds:
        return None
    return _read(next(one for one in kinds if one is not type(None)), data, where)


def _mapping(kind: Any, data: Any, where: str) -> Any:
    pairs = _of(Mapping, data, where, "an object")
    return {str(key): _read(get_args(kind)[1], one, f"{where}.{key}") for key, one in pairs.items()}


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    given, hints = _of(Mapping, data, where, "an object"), _hints(kind)
    values = {}
    for field in fields(kind):
        if field.name in given and field.compare:
            values[field.name] = _read(hints[field.name], given[field.name], f"{where}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise WireError(f"{where} has no '{field.name}'; it has {', '.join(map(str, given)) or 'nothing'}")
    try:
        return kind(**values)
    except ValueError as error:
        raise WireError(f"{where}: {error}") from None


def _tuple(kind: Any, data: Any, where: str) -> Any:
    items, kinds = _of(list | tuple, data, where, "a list"), get_args(kind)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(items) != len(kinds):
        raise WireError(f"{where} is a list of {len(kinds)}, not of {len(items)}")
    return tuple(_read(one, items[at], f"{where}[{at}]") for at, one in enumerate(kinds))


def _literal(kind: Any, data: Any, where: str) -> Any:
    words = get_args(kind)
    if data in words:
        return data
    if kind in _NEAREST and isinstance(data, str):
        return _NEAREST[kind]
    raise WireError(f"{where} is one of {', '.join(map(repr, words))}, not {_name(data)}")


_READERS: Final[dict[Any, Callable[[Any, Any, str], Any]]] = {
    Literal: _literal,
    Union: _optional,
    dict: _mapping,
    tuple: _tuple,
    types.UnionType: _optional,
}


def _plain(kind: Any, data: Any, where: str) -> Any:
    fits = isinstance(data, int | float) if kind is float else isinstance(data, kind)
    if not fits or (isinstance(data, bool) and kind is not bool):
        raise WireError(f"{where} is {kind.__name__}, not {_name(data)}")
    return kind(data)


def _of(kind: Any, data: Any, where: str, what: str) -> Any:
    if not isinstance(data, kind):
        raise WireError(f"{where} is {what}, not {_name(data)}")
    return data


def _known(part: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    known = {}
    for name, value in data.items():
        field = part.model_fields.get(name)
        if field is None:
            continue
        inner = hasattr(field.annotation, "model_fields") and isinstance(value, Mapping)
        known[name] = _known(field.annotation, value) if inner else value
        if name == "modules" and isinstance(value, Mapping):
            module = get_args(field.annotation)[1]
            known[name] = {key: _known(module, one) if isinstance(one, Mapping) else one for key, one in value.items()}
    return known


def _is_dtype(kind: Any) -> bool:
    return getattr(kind, "__module__", "") == "torch" and getattr(kind, "__name__", "") == "dtype"


def _dtype(data: Any, where: str) -> Any:
    import torch

    dtype = getattr(torch, data, None) if isinstance(data, str) else None
    if not isinstance(dtype, torch.dtype):
        raise WireError(f"{where} is the name of a dtype such as 'bfloat16', not {_name(data)}")
    return dtype


def _name(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 40 else type(data).__name__


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
