"""A snapshot of the device's memory as PyTorch's memory viewer opens it (pytorch.org/memory_viz).

On a GPU it is torch's own, with a segment more for each row of the ledger that torch's allocator does not know:
weights, pages, the context. On a CPU the rows are all there is.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autoglm_lab.errors import LabError
from autoglm_lab.memory.ledger import Ledger, Row

# Below where drivers and kernels put memory (they use the top of 47 bits), so that no made-up address is a real one.
_FIRST, _GRAIN = 1 << 40, 2 << 20
_OUTSIDE = ("weights", "kv", "owner", "activations", "context")


def snapshot(ledger: Ledger, device: torch.device) -> dict[str, Any]:
    """What the viewer reads. Segments that are ours have made-up addresses; their one block names its owner.

    Args:
        ledger: who holds what on ``device`` now.
    """
    if device.type == "cuda":
        taken: dict[str, Any] = torch.cuda.memory._snapshot()  # noqa: SLF001 - the viewer's documented way
    else:
        taken = {"segments": [], "device_traces": [[]], "allocator_settings": {}, "external_annotations": []}
    return {**taken, "segments": [*taken["segments"], *_segments(ledger, device)]}


def write_snapshot(path: str | Path, taken: dict[str, Any]) -> Path:
    """Write a snapshot, whole or not at all.

    Returns:
        The file.

    Raises:
        LabError: the folder is not there or cannot be written to, or the disk is full.
    """
    file = Path(path).expanduser()
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            pickle.dump(taken, stream)
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise LabError(
            f"the snapshot was not written to '{file}': {error.strerror or error}. Name a file in a folder that exists "
            "and has room, such as 'memory.pickle'"
        ) from None
    return file


def _segments(ledger: Ledger, device: torch.device) -> Iterator[dict[str, Any]]:
    address = _FIRST
    for row in ledger.on("device"):
        nbytes = row.nbytes or 0
        if nbytes <= 0 or not _is_outside(row, device):
            continue
        yield {
            "device": device.index or 0,
            "address": address,
            "total_size": nbytes,
            "allocated_size": nbytes,
            "active_size": nbytes,
            "requested_size": nbytes,
            "stream": 0,
            "segment_type": "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": [],
            "blocks": [
                {
                    "address": address,
                    "size": nbytes,
                    "requested_size": nbytes,
                    "state": "active_allocated",
                    "frames": [{"filename": "autoglm_lab", "line": 0, "name": f"{row.name}: {row.counts}"}],
                }
            ],
        }
        address += -(-nbytes // _GRAIN) * _GRAIN + _GRAIN


def _is_outside(row: Row, device: torch.device) -> bool:
    """Whether torch's allocator does not know these bytes of this process."""
    if device.type != "cuda":
        return row.kind in (*_OUTSIDE, "unattributed")
    return row.kind in _OUTSIDE and row.within is None
