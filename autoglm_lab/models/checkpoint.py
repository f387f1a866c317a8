"""Checkpoints on disk: which tensor's bytes lie where in a folder of safetensors.

Only headers are read here; `memory/` reads the bytes. Pickled weights and remote code are refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoglm_lab.errors import LoadError
from autoglm_lab.units import format_bytes

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE, REMOTE_CODE = "pickle", "remote-code"
ALLOWED = (PICKLE, REMOTE_CODE)
"""What is refused unless a person allows it by name: `load(..., allow="pickle")`."""


@dataclass(frozen=True)
class FileTensor:
    """One tensor inside a safetensors file.

    Attributes:
        path: the file.
        offset: its first byte, from the start of the file.
        nbytes: its length in bytes.
    """

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_folder(folder: Path, allow: Collection[str] = ()) -> dict[str, FileTensor]:
    """Where each tensor of a checkpoint folder lies, by the name that it has there.

    Args:
        allow: with ``pickle`` in it, a folder of pickled weights alone gives no tensors instead of an error.

    Raises:
        LoadError: no safetensors, pickled weights only, a missing or corrupt file.
    """
    index = folder / INDEX
    if index.is_file():
        return _read_index(folder, index)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return read_header(others[0])
    if others:
        raise LoadError(f"{folder} has {len(others)} safetensors files and no {INDEX} that says which tensor is where")
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLE_ENDINGS))
    if pickles and PICKLE in allow:
        return {}
    if pickles:
        raise refused_pickles(str(folder), pickles)
    raise LoadError(f"{folder} has no weights: expected {SINGLE} or {INDEX}")


def refused_pickles(where: str, names: Sequence[str]) -> LoadError:
    """The error for weights that are there as pickles alone."""
    return LoadError(
        f"{where} has only pickled weights ({', '.join(names[:3])}), which can run any code when read. Convert them to "
        "safetensors where you trust them (model.save_pretrained(folder)), or allow them: load(..., allow='pickle')"
    )


def _read_index(folder: Path, index: Path) -> dict[str, FileTensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index} is not an index of safetensors files: {error!r}") from None
    outside = sorted({file for file in files.values() if Path(file).name != file})
    if outside:
        raise LoadError(f"{index} points outside its folder: {outside[0]}")
    tensors: dict[str, FileTensor] = {}
    for file in sorted(set(files.values())):
        tensors.update(read_header(folder / file))
    absent = sorted(name for name in files if name not in tensors)
    if absent:
        raise LoadError(f"{index} names {len(absent)} tensors that its files do not hold, for example {absent[0]}")
    return tensors


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of one safetensors file, from its header.

    Raises:
        LoadError: the file is missing, truncated or corrupt; the message names it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_size = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= header_size <= min(_LARGEST_HEADER, size - 8):
                raise LoadError(f"{path} is not a safetensors file, or it is truncated ({format_bytes(size)})")
            entries = json.loads(file.read(header_size))
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"the header of {path} is corrupt: {error}") from None
    if not isinstance(entries, dict):
        raise LoadError(f"the header of {path} is corrupt: it is no table of tensors")
    entries.pop("__metadata__", None)
    start = 8 + header_size
    tensors = {name: _entry(path, name, entry, start) for name, entry in entries.items()}
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
    if end != size:
        state = "truncated" if size < end else "corrupt"
        raise LoadError(f"{path} is {state}: its header speaks of {end:,} bytes, the file has {size:,}. Fetch it again")
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> FileTensor:
    try:
        dtype = DTYPES[entry["dtype"]]
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(position) for position in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise LoadError(f"the header of {path} is corrupt, or has a dtype that torch lacks, at {name}") from None
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize or any(size < 0 for size in shape):
        raise LoadError(f"the header of {path} is corrupt: {name} {shape} does not take {end - begin:,} bytes")
    return FileTensor(path, start + begin, end - begin, dtype, shape)


def refuse_remote_code(config: Mapping[str, Any], source: str, allow: Collection[str] = ()) -> None:
    """Raise `LoadError` when a configuration asks for code that comes with the weights, unless that is allowed."""
    asked = config.get("auto_map")
    if asked and REMOTE_CODE not in allow:
        named = sorted({str(one) for one in asked.values()}) if isinstance(asked, Mapping) else [str(asked)]
        raise LoadError(
            f"{source} wants to run its own code (auto_map: {', '.join(named[:3])}), which is not run here. Use a "
            "model whose architecture transformers or autoglm_lab has, or, where you have read that code and trust it, "
            "load(..., allow='remote-code')"
        )
