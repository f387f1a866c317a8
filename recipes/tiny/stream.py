"""Samples from worker processes through shared memory into rings on the training device.

Slots of shared memory belong to groups; workers fill whichever slot is free, so that a group's share of slots is its
share of fresh samples. The rings are sampled at random: how often a sample is seen follows from the two rates.
"""

from __future__ import annotations

import multiprocessing as mp
import random
import threading
import time
from dataclasses import dataclass
from multiprocessing import shared_memory
from queue import Empty
from typing import Any

import numpy as np
import torch

from recipes.tiny.conversations import TRAINED
from recipes.tiny.encode import GROUPS, Group, write_sample

CHUNK = 64


def _bytes(group: Group) -> int:
    return CHUNK * sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in group.fields().values())


def _views(group: Group, memory: memoryview) -> dict[str, np.ndarray[Any, Any]]:
    found, at = {}, 0
    # The widest types first, so that each array is aligned.
    for name, (shape, kind) in sorted(group.fields().items(), key=lambda item: -np.dtype(item[1][1]).itemsize):
        array = np.ndarray((CHUNK, *shape), kind, memory, at)
        found[name] = array
        at += array.nbytes
    return found


def fill(out: dict[str, Any], group: Group, seed: int, tokenizer: Any) -> None:
    """CHUNK training samples of `group`, deterministic by `seed`."""
    rng = random.Random(f"{group.name} {seed}")
    for row in range(CHUNK):
        while not write_sample(out, row, group, TRAINED[group.name](rng, "train"), tokenizer):
            pass


def _work(weights: str, names: list[tuple[str, int]], free: Any, ready: Any) -> None:
    torch.set_num_threads(1)
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(weights)
    slots = [(shared_memory.SharedMemory(name=name), GROUPS[index]) for name, index in names]
    views = [_views(group, memory.buf) for memory, group in slots]
    while (ticket := free.get()) is not None:
        slot, seed = ticket
        fill(views[slot], slots[slot][1], seed, tokenizer)
        ready.put(slot)


@dataclass
class Ring:
    """Samples of one group on the device; `filled` of them are there."""

    group: Group
    data: dict[str, torch.Tensor]
    capacity: int
    filled: int = 0
    written: int = 0


class SampleStream:
    """Worker processes and the rings they feed.

    Args:
        weights: Folder with the tokenizer.
        device: Where the rings are.
        workers: Processes.
        seed: Base seed; chunk number n of a run is made from `seed * 10**6 + n`.
        shrink: Divides the rings' capacity, for small machines.
    """

    def __init__(self, weights: str, device: torch.device, workers: int, seed: int, shrink: int = 1) -> None:
        self.device, self.seed, self.tickets = device, seed * 10**6, 0
        context = mp.get_context("spawn")
        self.free, self.ready = context.Queue(), context.Queue()
        self.memories: list[shared_memory.SharedMemory] = []
        self.slot_groups: list[int] = []
        deepest = max(group.share for group in GROUPS)
        for rank in range(deepest):
            for index, group in enumerate(GROUPS):
                if rank < group.share:
                    self.memories.append(shared_memory.SharedMemory(create=True, size=_bytes(group)))
                    self.slot_groups.append(index)
        self.views = [_views(GROUPS[i], m.buf) for i, m in zip(self.slot_groups, self.memories, strict=True)]
        if device.type == "cuda":
            for memory in self.memories:
                address = np.frombuffer(memory.buf, np.uint8).ctypes.data
                # Without it copies are slower, not wrong.
                torch.cuda.cudart().cudaHostRegister(address, memory.size, 0)
        self.rings = [self._ring(group, shrink) for group in GROUPS]
        names = [(memory.name, index) for memory, index in zip(self.memories, self.slot_groups, strict=True)]
        self.workers = [
            context.Process(target=_work, args=(weights, names, self.free, self.ready), daemon=True)
            for _ in range(workers)
        ]
        for worker in self.workers:
            worker.start()
        for slot in range(len(self.memories)):
            self._give(slot)
        self.closing = False
        self.copying = threading.Lock()
        self.thread = threading.Thread(target=self._ingest, daemon=True)
        self.thread.start()

    def _ring(self, group: Group, shrink: int) -> Ring:
        capacity = max(CHUNK * 4, group.pool // shrink // CHUNK * CHUNK)
        data = {
            name: torch.empty((capacity, *shape), dtype=getattr(torch, kind), device=self.device)
            for name, (shape, kind) in group.fields().items()
        }
        return Ring(group, data, capacity)

    def _give(self, slot: int) -> None:
        self.free.put((slot, self.seed + self.tickets))
        self.tickets += 1

    def _ingest(self) -> None:
        """Move finished chunks into the rings until closed.

        The copies run beside training on a stream of their own. Once a ring is full a sample may be drawn while it is
        overwritten; with rings this large that is about one sample in a thousand steps.
        """
        stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        while not self.closing:
            try:
                slot = self.ready.get(timeout=0.2)
            except Empty:
                continue
            # Held while a graph is captured: another thread's calls would break the capture.
            with self.copying:
                self._take(slot, stream)
            self._give(slot)
            if stream is None:
                # The processor that trains is the one that makes the data: let it train.
                time.sleep(0.3)

    def _take(self, slot: int, stream: Any) -> None:
        ring, view = self.rings[self.slot_groups[slot]], self.views[slot]
        at = ring.written % ring.capacity
        with torch.cuda.stream(stream):
            for name, array in view.items():
                ring.data[name][at : at + CHUNK].copy_(torch.from_numpy(array), non_blocking=True)
        if stream is not None:
            stream.synchronize()
        ring.written += CHUNK
        ring.filled = min(ring.capacity, ring.written)

    def wait(self, least: int) -> None:
        """Until every ring has `least` samples."""
        while any(ring.filled < least for ring in self.rings):
            time.sleep(0.05)

    def close(self) -> None:
        """Stop the workers and free the shared memory."""
        self.closing = True
        self.thread.join()
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join()
        self.views = []
        for memory in self.memories:
            if self.device.type == "cuda":
                address = np.frombuffer(memory.buf, np.uint8).ctypes.data
                torch.cuda.cudart().cudaHostUnregister(address)
            memory.unlink()
