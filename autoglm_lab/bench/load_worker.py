"""One load in a process of its own, for `bench.load`; prints its figures as one line of JSON.

``python -m autoglm_lab.bench.load_worker ours|stock|limits FOLDER DEVICE``
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from autoglm_lab.memory.residency.staging import CHUNK, LANES

_EVERY = 0.002
_COPIES = 20
Figures = dict[str, float | None]


def ours(folder: Path, device: torch.device) -> Figures:
    """Seconds until the weights are on the device and until one can chat; peaks."""
    from autoglm_lab.memory.accelerator import open_accelerator
    from autoglm_lab.memory.residency.residency import Residency
    from autoglm_lab.models.loading import resolve
    from autoglm_lab.opening import load

    _import_model(folder)
    accelerator = open_accelerator(device)

    def bring() -> Residency:
        residency = Residency(resolve(folder, device=device, dtype="bfloat16"), accelerator)
        residency.materialise()
        return residency

    residency, figures = _measured(bring, device)
    figures["device"] = _over(figures["device"], sum(module.nbytes for module in residency.values()))
    residency.close()
    del residency
    start = time.perf_counter()
    with load(folder, device=str(device), dtype="bfloat16", progress=False):
        figures["whole"] = time.perf_counter() - start
    return figures


def stock(folder: Path, device: torch.device) -> Figures:
    """The same of ``from_pretrained``."""
    cls = _import_model(folder)

    def bring() -> Any:
        return cls.from_pretrained(folder, dtype=torch.bfloat16, device_map=str(device), local_files_only=True)

    model, figures = _measured(bring, device)
    figures["device"] = _over(figures["device"], sum(parameter.nbytes for parameter in model.parameters()))
    return figures


def _import_model(folder: Path) -> Any:
    """The model's class, its code imported: neither side's clock has begun."""
    import autoglm_lab.models.autoglm  # noqa: F401 - registers the architecture with transformers' Auto classes
    from autoglm_lab.models.location import locate
    from autoglm_lab.models.skeleton import model_class

    return model_class(locate(folder).config)


def limits(folder: Path, device: torch.device) -> Figures:
    """Bytes a second from the files into memory, and from pinned memory to the device."""
    paths = sorted(folder.glob("*.safetensors"))
    chunks = [(path, offset) for path in paths for offset in range(0, path.stat().st_size, CHUNK)]
    buffers = threading.local()

    def read(chunk: tuple[Path, int]) -> int:
        if not hasattr(buffers, "memory"):
            buffers.memory = memoryview(bytearray(CHUNK))
        handle = os.open(chunk[0], os.O_RDONLY)
        try:
            return os.preadv(handle, [buffers.memory], chunk[1])
        finally:
            os.close(handle)

    rate = 0.0
    with ThreadPoolExecutor(min(LANES, os.cpu_count() or 1)) as threads:
        for _ in range(2):  # the first brings what is not in the page cache, and touches the buffers
            start = time.perf_counter()
            count = sum(threads.map(read, chunks))
            rate = count / (time.perf_counter() - start)
    return {"file": rate, "bus": _bus(device) if device.type == "cuda" else None}


def _bus(device: torch.device) -> float:
    source = torch.zeros(CHUNK * LANES, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(_COPIES):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    return _COPIES * source.nbytes / (time.perf_counter() - start)


def _measured(bring: Callable[[], Any], device: torch.device) -> tuple[Any, Figures]:
    cuda = device.type == "cuda"
    if cuda:
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    with _watched(device) as peaks:
        start = time.perf_counter()
        loaded = bring()
        if cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return loaded, {"seconds": seconds, "device": peaks["device"] if cuda else None, "host": peaks["host"]}


@contextmanager
def _watched(device: torch.device) -> Iterator[dict[str, int]]:
    """The most bytes that the device and the process's anonymous memory took meanwhile."""
    cuda, over = device.type == "cuda", threading.Event()
    free = torch.cuda.mem_get_info(device)[0] if cuda else 0
    before, peaks = _anonymous(), {"device": 0, "host": 0}

    def look() -> None:
        peaks["host"] = max(peaks["host"], _anonymous() - before)
        if cuda:
            peaks["device"] = max(peaks["device"], free - torch.cuda.mem_get_info(device)[0])

    def watch() -> None:
        while not over.wait(_EVERY):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()
        look()


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _over(peak: float | None, weights: int) -> float | None:
    return None if peak is None else max(0.0, peak - weights)


def main(arguments: Sequence[str]) -> None:
    """Run what the command line names."""
    who, folder, device = arguments
    run = {"ours": ours, "stock": stock, "limits": limits}[who]
    print(json.dumps(run(Path(folder), torch.device(device))))


if __name__ == "__main__":
    main(sys.argv[1:])
