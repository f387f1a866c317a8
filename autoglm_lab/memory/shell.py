"""What an interactive session keeps alive unseen: the last error's frames, and the outputs of its cells."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, strided

from autoglm_lab.units import MiB, format_bytes

# A tensor on the host is worth a word from here on; on a GPU every one is.
_LARGE = MiB
_DEPTH = 3
_OUTPUT = re.compile(r"_\d+|_{1,3}")


def forget_last_error() -> None:
    """Clear the frames of the last uncaught error, whose variables would stay alive with it."""
    kept = [getattr(sys, "last_exc", None), getattr(sys, "last_value", None)]
    shell = _shell()
    if shell is not None:
        kept.append(getattr(getattr(shell, "last_execution_result", None), "error_in_exec", None))
    for error in kept:
        seen: set[int] = set()
        while isinstance(error, BaseException) and id(error) not in seen:
            seen.add(id(error))
            _clear(error.__traceback__)
            error = error.__cause__ or error.__context__
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    if shell is not None:
        setattr(shell, "_last_traceback", None)  # noqa: B010 - IPython has no public way


def _clear(frames: TracebackType | None) -> None:
    traceback.clear_frames(frames)
    while frames is not None:
        # Before Python 3.13 whoever has looked at a frame's variables, as IPython has, left a copy of them with it,
        # which is brought up to date when it is looked at again.
        _ = frames.tb_frame.f_locals
        frames = frames.tb_next


def kept_outputs() -> str:
    """Which outputs of cells keep tensors alive, how large, and how to let them go; empty where none does."""
    shell = _shell()
    space: Mapping[str, Any] = getattr(shell, "user_ns", {})
    outputs = [(f"Out[{number}]", value) for number, value in tuple(dict(space.get("Out") or {}).items())]
    # The same values under their other names, which stay when only Out is cleared.
    outputs += [(name, value) for name, value in tuple(space.items()) if _OUTPUT.fullmatch(name)]
    counted: set[int] = set()
    names, nbytes = [], 0
    for name, value in outputs:
        held = {_storage(tensor): _size(tensor) for tensor in _tensors(value) if _counts(tensor)}
        fresh = {key: size for key, size in held.items() if key not in counted}
        counted.update(fresh)
        if fresh:
            names.append(name)
            nbytes += sum(fresh.values())
    if not names:
        return ""
    keep = "keeps" if len(names) == 1 else "keep"
    return f"{', '.join(names)} {keep} {format_bytes(nbytes)} of tensors alive: %reset -f out lets them go"


def _shell() -> Any:
    """IPython's shell, where there is one; never imports IPython."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.layout is strided:  # sparse ones have no storage of their own
            yield value
    elif depth and isinstance(value, Mapping):
        for one in tuple(value.values()):
            yield from _tensors(one, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for one in tuple(value):
            yield from _tensors(one, depth - 1)


def _counts(tensor: Tensor) -> bool:
    return tensor.device.type not in {"cpu", "meta"} or (tensor.device.type == "cpu" and _size(tensor) >= _LARGE)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
