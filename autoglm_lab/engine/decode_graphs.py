"""Decode steps as captured CUDA graphs: one for each batch size, replayed for whatever conversations are in it.

A graph reads ids, positions, lengths and block tables from fixed places, keys and values from the pages, and weights
from slabs whose addresses never change, so it stays right while conversations come, grow and go, and while modules are
parked and woken.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoglm_lab.engine.compile_ahead import CompileAhead
from autoglm_lab.engine.lean_forward import LeanForward
from autoglm_lab.memory.kv import paged_kernels
from autoglm_lab.memory.kv.host_prefetch import HostPrefetch, stage_width
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS
from autoglm_lab.memory.kv.paged_attention import decoder_configs, paged
from autoglm_lab.memory.kv.paged_cache import GraphCache
from autoglm_lab.memory.kv.paged_sequence import PagedSequence
from autoglm_lab.memory.ledger import Row
from autoglm_lab.schedule import BATCH_SIZES as SIZES

_NAP = 50e-6
_GRAIN = 512  # what torch's allocator rounds up to


@dataclass
class _Graph:
    """A captured step, and the places that it reads and writes, which live as long as it does.

    Attributes:
        outside: bytes of these places outside of the graphs' pool.
    """

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    positions: Tensor
    lengths: Tensor
    table: Tensor
    logits: Tensor
    rows: list[list[int]]
    cache: GraphCache
    outside: int


class DecodeGraphs:
    """The captured decode steps of one model and pool. Only the engine's thread uses it.

    Args:
        planes: 1, or 3 where positions have time, rows and columns.
        context_tokens: most tokens of a conversation.
        before: called before a step is replayed.
        meanwhile: called again and again while the device computes.
        told: called with a text and seconds when a graph was captured, or could not be.
        growth: counts what the driver takes meanwhile under a name.
        warm_up: counts what libraries take for the current stream.

    Attributes:
        usable: whether steps can be captured here, as far as that is known.
        lean: what stands in for modules in a captured step.
    """

    def __init__(
        self,
        model: Any,
        pool: KvPool,
        *,
        planes: int = 1,
        context_tokens: int | None = None,
        before: Callable[[], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
        told: Callable[[str, float], None] | None = None,
        growth: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        warm_up: Callable[[], None] | None = None,
    ) -> None:
        device: torch.device = model.device
        self.usable = device.type == "cuda" and bool(decoder_configs(model)) and paged_kernels.possible(pool)
        self._ahead = CompileAhead(model, pool) if self.usable else None
        self._model, self._pool, self._planes = model, pool, planes
        self._width = -(-(context_tokens or 65_536) // PAGE_TOKENS)
        self._before, self._meanwhile, self._told = before, meanwhile, told
        self._growth, self._warm_up = growth, warm_up
        self._configs = decoder_configs(model)
        self.lean = LeanForward(model)
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._memory: Any = None
        self._spare: list[int] = []
        self._cached = self._allocated = 0
        self._done: torch.cuda.Event | None = None

    @torch.no_grad()
    def step(self, sequences: Sequence[PagedSequence], tokens: Sequence[int], positions: Tensor) -> Tensor | None:
        """Read one token of each row.

        Args:
            positions: of the new tokens, ``[batch, 1]`` or ``[planes, batch, 1]``.

        Returns:
            Logits ``[batch, vocab]``, float32; None where no graph fits: nothing was done.

        Raises:
            OutOfMemoryError: there are no pages for the new tokens; nothing was done.
        """
        longest = max(sequence.tokens for sequence in sequences) + 1
        size = next((size for size in SIZES if size >= len(sequences)), None)
        same_pool = sequences[0].pool is self._pool
        if not self.usable or not same_pool or size is None or longest > self._width * PAGE_TOKENS:
            return None
        width = stage_width(longest) if self._pool.place == "host" else 0
        graph = self._graphs.get((size, width)) or self._captured(size, width)
        if graph is None:
            return None
        before = [sequence.tokens for sequence in sequences]
        try:
            for sequence in sequences:
                sequence.reserve(1)
            self._place(graph, sequences, tokens, positions)
            if self._before is not None:
                self._before()
            graph.graph.replay()
            self._wait()
        except BaseException:
            for sequence, kept in zip(sequences, before, strict=True):
                sequence.keep(kept)
            raise
        for sequence in sequences:
            sequence.tokens += 1
        return graph.logits[: len(sequences)].float()

    def prepare(self) -> None:
        """Let libraries take what they keep for the stream of captures; costs nothing when they did."""
        if self.usable and self._warm_up is not None:
            with torch.cuda.stream(_side_stream(self._model.device)):
                self._warm_up()
            self._warm_up = None

    def wait_for_kernels(self) -> None:
        """Until the kernels that a step needs are compiled."""
        if self._ahead is not None:
            with self._growth("kernels"):
                self._ahead.wait()

    def clear(self) -> None:
        """Forget every graph; their memory is the allocator's again."""
        self._graphs.clear()
        self._memory, self._cached, self._allocated = None, 0, 0
        self._pool.put(self._spare)
        self._spare = []

    def holdings(self) -> Iterable[Row]:
        """Rows of the graphs' memory: what their steps work in lies in the allocator's cache."""
        if self._cached:
            counts = f"working memory of {len(self._graphs)} captured decode steps, inside torch's allocator"
            yield Row("decode graphs", "owner", "device", self._cached, counts, within="cache")
        if self._allocated:
            counts = "where captured decode steps are told what to read, read it from, and put their logits"
            yield Row("decode graphs' tables", "owner", "device", self._allocated, counts, within="allocator")
        if self._spare:
            counts = "a page that the empty rows of a captured step write to"
            yield Row("decode graphs' page", "owner", self._pool.place, self._pool.page_bytes, counts)

    def _place(
        self, graph: _Graph, sequences: Sequence[PagedSequence], tokens: Sequence[int], positions: Tensor
    ) -> None:
        count = len(sequences)
        graph.ids[:count, 0].copy_(torch.tensor(tokens), non_blocking=True)
        graph.positions[..., :count, :].copy_(positions, non_blocking=True)
        lengths = [sequence.tokens + 1 for sequence in sequences]
        lengths += [1] * (graph.lengths.shape[0] - count)
        graph.lengths.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)
        spare = [self._spare] * (graph.lengths.shape[0] - count)
        for row, pages in enumerate([*(sequence.pages for sequence in sequences), *spare]):
            if graph.rows[row] != pages:
                graph.rows[row] = list(pages)
                graph.table[row, : len(pages)].copy_(torch.tensor(pages, dtype=torch.int32), non_blocking=True)

    def _wait(self) -> None:
        """Until the step is done; the engine's thread serves others meanwhile."""
        self._done = self._done or torch.cuda.Event()
        self._done.record()
        while not self._done.query():
            if self._meanwhile is not None:
                self._meanwhile()
            time.sleep(_NAP)

    def _tell(self, text: str, seconds: float) -> None:
        if self._told is not None:
            self._told(text, seconds)

    def _captured(self, size: int, width: int) -> _Graph | None:
        start = time.perf_counter()
        self.wait_for_kernels()
        if not paged_kernels.available(self._pool):
            self.usable = False
            self._tell(f"decode steps are not captured: {paged_kernels.why_not(self._pool)}", 0.0)
            return None
        try:
            with self._growth("decode graphs"):
                graph = self._capture(size, width)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.usable = False
            self._tell(f"decode steps of this model cannot be captured: {error}".split("\n")[0], 0.0)
            return None
        if width:  # a narrower stage is not needed any more
            self._graphs = {key: one for key, one in self._graphs.items() if key[0] != size}
        self._graphs[size, width] = graph
        self._tell(f"decode of {size} captured", time.perf_counter() - start)
        return graph

    def _capture(self, size: int, width: int) -> _Graph:
        device = self._model.device
        if not self._spare:
            self._spare = self._pool.take(1)
        shape = (size, 1) if self._planes == 1 else (self._planes, size, 1)
        ids = torch.zeros((size, 1), dtype=torch.long, device=device)
        positions = torch.zeros(shape, dtype=torch.long, device=device)
        lengths = torch.ones(size, dtype=torch.int32, device=device)
        table = torch.full((size, self._width), self._spare[0], dtype=torch.int32, device=device)
        prefetch = HostPrefetch(self._pool, table, lengths, width) if width else None
        cache = GraphCache(self._pool, table, lengths, prefetch)
        arguments: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self._accepted else {}

        def forward() -> Tensor:
            logits: Tensor = self._model(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **arguments
            ).logits
            return logits[:, -1]

        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        self.prepare()
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with paged(self._configs, cache), self.lean.active():
            with torch.cuda.stream(stream):
                forward()  # kernels are loaded and compiled before the capture
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
                logits = forward()
        self._cached, held = _pool_bytes(self._memory)
        outside = sum(-(-one.nbytes // _GRAIN) * _GRAIN for one in (ids, positions, lengths, table))
        outside += 0 if prefetch is None else prefetch.nbytes
        others = sum(one.outside for key, one in self._graphs.items() if not width or key[0] != size)
        self._allocated = held + outside + others
        return _Graph(graph, ids, positions, lengths, table, logits, [[] for _ in range(size)], cache, outside)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are captured: one stream for the process, since cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)


def _pool_bytes(handle: Any) -> tuple[int, int]:
    """Bytes that a graph's private pool holds in torch's allocator: in no tensor, and in tensors."""
    segments = torch.cuda.memory_snapshot()
    own = [one for one in segments if tuple(one["segment_pool_id"]) == tuple(handle)]
    held = sum(one["allocated_size"] for one in own)
    return sum(one["total_size"] for one in own) - held, held
