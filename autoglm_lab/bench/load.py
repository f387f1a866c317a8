"""Loading a folder of safetensors, each in a fresh process: ours, transformers' own, what disk and bus allow."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.errors import LabError
from autoglm_lab.models import catalog
from autoglm_lab.models.anatomy import named_tensors
from autoglm_lab.models.checkpoint import DTYPES, INDEX
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.units import format_bytes

_TIMES = 3
_TIMEOUT = 170
_SHARD, _SMALL_SHARD = 5 * 10**9, 4 * 10**6
_BLOCK = 16 << 20
_SPARE = 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STOCK = "from_pretrained"


def run(bench: Bench) -> Report:
    """Write the folder, load it with each in turn, and read it as fast as the machine can.

    Raises:
        LabError: the temporary folder has no room for it, or a process failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="autoglm-lab-load-"))
    try:
        config = catalog.preset("autoglm-tiny" if bench.small else "autoglm-phone-9b").config()
        bench.say(f"writing made-up weights to {folder}")
        nbytes, largest = write_folder(folder, config, _SMALL_SHARD if bench.small else _SHARD)
        bench.say(f"reading {format_bytes(nbytes)} as fast as this machine does")
        limits = _process("limits", folder, bench)
        found: dict[str, list[dict[str, float | None]]] = {"stock": [], "ours": []}
        for _ in range(1 if bench.small else _TIMES):
            for who, runs in found.items():
                bench.say(f"loading: {who}")
                runs.append(_process(who, folder, bench))
        ours, stock = _typical(found["ours"]), _typical(found["stock"])
        return bench.report("loading a folder", _figures(bench, ours, stock, limits, nbytes, largest), *_NOTES)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_NOTES = (
    "Each load is a process of its own with a warm page cache; context and imports come before the clock starts.",
    "Seconds until the weights are on the device; 'until one can chat' is all of load() with the engine started.",
    "The limit is the slower of reading the files in as many threads, and of copying from pinned memory to the device.",
    "The host's peak is anonymous memory over what the process held before, read every 2 ms.",
)


def _figures(
    bench: Bench,
    ours: dict[str, float | None],
    stock: dict[str, float | None],
    limits: dict[str, float | None],
    nbytes: int,
    largest: int,
) -> list[Figure]:
    file, bus = limits["file"] or 0.0, limits["bus"]
    rate = min(file, bus) if bus else file
    seconds, theirs = ours["seconds"] or 0.0, stock["seconds"] or 0.0
    times, over, host = theirs / seconds, ours["device"], ours["host"]
    return [
        Figure("time to load", "s", seconds, {_STOCK: theirs}, nbytes / rate),
        Figure("rate", "GB/s", nbytes / seconds / 1e9, {_STOCK: nbytes / theirs / 1e9}, rate / 1e9),
        Figure(f"faster than {_STOCK}", "x", times, {}, None, ">= 2.5 x", bench.judge(times >= 2.5)),
        Figure(
            "peak on the device over the weights",
            "B",
            over,
            {_STOCK: stock["device"]},
            None,
            "<= 0.2 GB",
            None if over is None else bench.judge(over <= 200_000_000),
        ),
        Figure(
            "peak of the host",
            "B",
            host,
            {_STOCK: stock["host"]},
            None,
            f"<= {format_bytes(largest)}, the largest file",
            None if host is None else bench.judge(host <= largest),
        ),
        Figure("until one can chat", "s", ours["whole"]),
        Figure("files into memory", "GB/s", file / 1e9),
        Figure("pinned memory to the device", "GB/s", None if bus is None else bus / 1e9),
    ]


def _typical(runs: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The median of each figure; the most of a peak."""
    typical: dict[str, float | None] = {}
    for name in runs[0]:
        values = [value for one in runs if (value := one[name]) is not None]
        typical[name] = None if not values else max(values) if name in ("device", "host") else median(values)
    return typical


def _process(who: str, folder: Path, bench: Bench) -> dict[str, float | None]:
    command = [sys.executable, "-m", "autoglm_lab.bench.load_worker", who, str(folder), str(bench.device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise LabError(f"loading with {who} took more than {_TIMEOUT} s") from None
    if done.returncode != 0:
        raise LabError(f"loading with {who} failed:\n{done.stderr.strip()[-2000:]}")
    found: dict[str, float | None] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def write_folder(folder: Path, config: Any, shard: int) -> tuple[int, int]:
    """Write a model's configuration and made-up bfloat16 weights of its shapes, as transformers would save them.

    Args:
        shard: most bytes of a file, unless one tensor has more.

    Returns:
        Bytes of all tensors, and of the largest file.

    Raises:
        LabError: the folder has no room.
    """
    model = skeleton(config, torch.bfloat16)
    tensors = dict(named_tensors(model))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < nbytes + _SPARE:
        raise LabError(
            f"{folder.parent} has {format_bytes(free)} free, the weights take {format_bytes(nbytes)}: set TMPDIR to a "
            "folder on another disk"
        )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    files = list(_shards(tensors, shard))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return nbytes, max(sum(tensors[name].nbytes for name in names) for names in files)


def _shards(tensors: dict[str, Tensor], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        if names and held + tensor.nbytes > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += tensor.nbytes
    yield names


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        places = [end, end + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = torch.randn(_BLOCK // 2, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    block = memoryview(values.view(torch.uint8).numpy().data)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, _BLOCK):
            file.write(block[: min(_BLOCK, end - begin)])
