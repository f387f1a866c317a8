"""Peaks of the engine's steps, from a trace of the model's own code on tensors without data."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from torch import Tensor

from autoglm_lab.memory.allocator_model import AllocatorModel, Held
from autoglm_lab.memory.page_format import PageFormat
from autoglm_lab.memory.tape import Tape, TapeFamily
from autoglm_lab.memory.traced_model import Kind, TracedModel
from autoglm_lab.memory.workload import Workload
from autoglm_lab.models.loading import Outline
from autoglm_lab.schedule import BATCH_SIZES, FEED_FORWARD_TOKENS, prefill_chunks
from autoglm_lab.units import MiB

_LEAST_LAYERS = 3
_GRAPH_SCRATCH = 22 * MiB
"""What the first capture takes beside its tensors, for libraries: 23.6 MiB were measured for one captured step and 44.6
for a second of four rows (docs/benchmarks.md, "keys and values"), of which tensors explain 2 and 22."""
_SHORT, _LONG = (64, 128, 256, 384), (1024, 1536, 2048, 3072)

Medium = Literal["vision", "audio"]


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that a phase holds in torch's allocator.

    Attributes:
        allocated: bytes in tensors.
        reserved: bytes that the allocator takes from the device for them.
        left: further bytes that it keeps from the phase before; it gives them back where memory is short.
    """

    allocated: int
    reserved: int
    left: int = 0

    @property
    def cached(self) -> int:
        return max(0, self.reserved - self.allocated)


@dataclass(frozen=True, slots=True)
class Steps:
    """What a request lets the engine do.

    Attributes:
        form: of the pages; None: the model keeps its own cache, and ``prefill`` and ``decode`` hold it.
        prompt: tokens that are read.
        kept: tokens in the cache at the end.
        chunk: most tokens of one step.
        batch: conversations that decode together.
        graphs: whether decode steps are captured.
    """

    form: PageFormat | None
    prompt: int
    kept: int
    chunk: int
    batch: int
    graphs: bool


@dataclass(frozen=True, slots=True)
class Work:
    """The peaks of a request's phases.

    Attributes:
        encode: None where there is nothing to encode.
        features: bytes of the encoders' outputs, which stay while the prompt is read.
        own_cache: bytes of keys and values that lie among the tensors of prefill and decode.
        graphs: bytes of captured decode steps.
    """

    encode: Peak | None
    prefill: Peak
    decode: Peak
    features: int = 0
    own_cache: int = 0
    graphs: int = 0


class Activations:
    """What the steps of one model need beside weights, keys and values. From any thread; each step is traced once.

    Attributes:
        notes: what could not be traced, one sentence each.
    """

    def __init__(self, outline: Outline, kind: Kind) -> None:
        self._outline, self._kind = outline, kind
        self._config: Any = outline.model.config
        self._families: dict[Any, TapeFamily | None] = {}
        self._media: dict[Any, tuple[Tape, int] | None] = {}
        self._owned: dict[Any, tuple[Peak, int]] = {}
        self._lock = threading.RLock()
        self.notes: tuple[str, ...] = ()

    def work(self, steps: Steps, workload: Workload, media: Sequence[Medium]) -> Work:
        """The peaks of every phase; milliseconds where the same kind of step was traced before."""
        with self._lock:
            try:
                work = self._work(steps, workload, media)
            except Exception as error:  # noqa: BLE001 - any model's own code runs here
                self._note_failure("the steps of this model", error)
                work = Work(None, Peak(0, 0), Peak(0, 0))
            return work if self._kind == "cuda" else _uncached(work)

    def _work(self, steps: Steps, workload: Workload, media: Sequence[Medium]) -> Work:
        counted = [(self._medium(one, workload), workload.images if one == "vision" else 1) for one in media]
        encoded = [(traced, count) for traced, count in counted if traced is not None]
        allocator, features = AllocatorModel(), 0
        encode = None
        for (tape, nbytes), count in encoded:
            for _ in range(count):
                allocator.play(tape)  # what it keeps, its output, stays in the model of the allocator
                features += nbytes
        if encoded:
            encode = Peak(allocator.peak_allocated, allocator.reserved)
        if steps.form is None:
            return self._own(steps, encode, features)
        before = allocator.reserved
        alone = self._read(steps, features, AllocatorModel())
        after = self._read(steps, 0, allocator)
        left = max(0, after.reserved - alone.reserved)
        prefill = Peak(alone.allocated - features, alone.reserved - features, left)
        captured = steps.graphs and steps.batch <= BATCH_SIZES[-1]
        written = 0 if captured else self._write(steps)
        decode = Peak(written, written, max(before, after.reserved) - features)
        graphs = self._graphs(steps) if steps.graphs else 0
        return Work(encode, prefill, decode, features, 0, graphs)

    # reading and writing

    def _read(self, steps: Steps, features: int, allocator: AllocatorModel) -> Peak:
        if features:
            allocator.hold(features)
        allocator.peak_allocated = allocator.allocated
        held: Held = {}
        vocabulary = int(self._config.get_text_config().vocab_size)
        for first, last in _telling(self._chunks(steps)):
            kept = allocator.play(self._prefill_tape(steps.form, first, last - first))
            allocator.free(held)
            held = {**kept, -1: allocator.hold(4 * vocabulary)[0]}
        return Peak(allocator.peak_allocated, allocator.reserved)

    def _chunks(self, steps: Steps) -> list[tuple[int, int]]:
        if self._bidirectional:  # a turn of the user is read at once
            return [(0, steps.prompt)]
        return prefill_chunks(0, steps.prompt, steps.chunk)

    def _write(self, steps: Steps) -> int:
        form, batch = steps.form, steps.batch
        family = self._family(
            ("decode", form, batch),
            lambda total: (1, total),
            lambda total: self._traced.decode(form, batch, total - 1),
            [(256,), (4096,)],
        )
        tape = self._traced.decode(form, batch, steps.kept - 1) if family is None else family.at(steps.kept)
        return tape.peak if self._kind == "cpu" else _reserved(tape)

    def _graphs(self, steps: Steps) -> int:
        pool = AllocatorModel()
        for size in captured_batches(steps.batch):
            tape = self._captured(steps.form, size)
            pool.play(tape)
        return pool.reserved + _GRAPH_SCRATCH

    @lru_cache(maxsize=16)  # noqa: B019 - a planner lives as long as its model is asked for
    def _captured(self, form: PageFormat, size: int) -> Tape:
        return self._traced.decode(form, size, 255)

    def _prefill_tape(self, form: PageFormat | None, before: int, new: int) -> Tape:
        short, whole = new <= FEED_FORWARD_TOKENS, self._bidirectional
        lengths = _SHORT if short else _LONG
        points: list[tuple[int, ...]]
        terms: Callable[..., tuple[int, ...]]
        if before == 0:
            points, terms = [(0, new) for new in lengths[:3]], lambda _, new: (1, new, new * new)
        else:
            points = [(start, new) for start in (512, 2048) for new in lengths[:2]]
            terms = lambda start, new: (1, new, start, new * start)  # noqa: E731 - beside its points
        family = self._family(
            ("prefill", form, before > 0, short),
            terms,
            lambda start, count: self._traced.prefill(form, start, count, bidirectional=whole),
            points,
        )
        if family is not None:
            return family.at(before, new)
        return self._traced.prefill(form, before, new, bidirectional=whole)

    def _family(
        self,
        key: Any,
        terms: Callable[..., tuple[int, ...]],
        record: Callable[..., Tape],
        points: Sequence[tuple[int, ...]],
    ) -> TapeFamily | None:
        """The tapes of a kind of step; None where it goes another way at other lengths."""
        if key not in self._families:
            try:
                self._families[key] = TapeFamily(terms, [(point, record(*point)) for point in points])
            except ValueError:
                self._families[key] = None
        return self._families[key]

    # encoders

    def _medium(self, medium: Medium, workload: Workload) -> tuple[Tape, int] | None:
        """The tape of encoding one medium, and the bytes of its output."""
        key = medium, workload.image_size if medium == "vision" else workload.audio_seconds
        if key not in self._media:
            try:
                inputs = media_inputs(self._outline.processor(), self._outline.model, medium, workload)
                tape, nbytes = self._traced.encode("image" if medium == "vision" else "audio", inputs)
                self._media[key] = tape, nbytes
            except Exception as error:  # noqa: BLE001 - any model's own code runs here
                self._media[key] = None
                self._note_failure(f"encoding with {medium}", error)
        return self._media[key]

    def _note_failure(self, what: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        note = f"{what} could not be traced, so their activations are not counted ({reason})"
        self.notes = self.notes if note in self.notes else (*self.notes, note)

    # models whose cache cannot be paged

    def _own(self, steps: Steps, encode: Peak | None, features: int) -> Work:
        prefill, kept = self._owning(tuple(_telling(self._chunks(steps))))
        whole, all_kept = self._owning((*_telling(self._chunks(steps)), (steps.kept - 1, steps.kept)))
        growth = max(0, all_kept - kept)
        decode = Peak(max(prefill.allocated, whole.allocated), max(prefill.reserved, whole.reserved) + growth)
        return Work(encode, prefill, decode, features, all_kept)

    def _owning(self, chunks: tuple[tuple[int, int], ...]) -> tuple[Peak, int]:
        """The peak of reading ``chunks`` into transformers' own cache, less the cache; and the cache's bytes."""
        if chunks not in self._owned:
            figures = []
            for traced in (self._traced, self._deeper):
                tape = traced.whole([(first, last - first) for first, last in chunks])
                allocator = AllocatorModel()
                allocator.play(tape)
                figures.append((tape.kept, allocator.peak_allocated, allocator.reserved))
            depth = int(self._config.get_text_config().num_hidden_layers)
            few, more = self._traced.layers, self._deeper.layers
            share = (depth - few) / (more - few) if more > few else 0
            kept, peak, reserved = (int(low + share * (high - low)) for low, high in zip(*figures, strict=True))
            self._owned[chunks] = Peak(max(0, peak - kept), max(0, reserved - kept)), kept
        return self._owned[chunks]

    # what is traced

    @cached_property
    def _traced(self) -> TracedModel:
        return TracedModel(self._config, self._outline.dtype, self._kind, self._period)

    @cached_property
    def _deeper(self) -> TracedModel:
        return TracedModel(self._config, self._outline.dtype, self._kind, 2 * self._period)

    @property
    def _period(self) -> int:
        """Layers after which every kind of layer has come."""
        kinds = getattr(self._config.get_text_config(), "layer_types", None) or ["full"]
        first = next(count for count in range(1, len(kinds) + 1) if set(kinds[:count]) == set(kinds))
        return max(first, _LEAST_LAYERS)

    @property
    def _bidirectional(self) -> bool:
        return bool(getattr(self._config, "bidirectional_prompt", False))


def media_inputs(processor: Any, model: Any, medium: Medium, workload: Workload) -> dict[str, Tensor]:
    """What the model's encoder is given for one blank image or silent sound of the workload's size."""
    import inspect

    if medium == "vision":
        from PIL import Image

        given = processor.image_processor(images=[Image.new("RGB", workload.image_size)], return_tensors="pt")
        encoder = model.get_image_features
    else:
        front = processor.feature_extractor
        silence = np.zeros(round(workload.audio_seconds * front.sampling_rate), np.float32)
        given = front(silence, sampling_rate=front.sampling_rate, return_tensors="pt")
        encoder = model.get_audio_features
    accepted = inspect.signature(encoder).parameters
    return {name: value for name, value in given.items() if name in accepted and isinstance(value, Tensor)}


def captured_batches(conversations: int) -> tuple[int, ...]:
    """Batches whose decode step is captured: one alone, and all together as far as there is a step for so many."""
    together = next((size for size in BATCH_SIZES if size >= conversations), 1)
    return (1,) if together == 1 else (1, together)


def _telling(chunks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The chunks that can hold the peak: the first two, and the last."""
    return chunks if len(chunks) <= 3 else [*chunks[:2], chunks[-1]]


def _uncached(work: Work) -> Work:
    """Where what is freed goes back to the system, and nothing is kept for later."""
    encode = None if work.encode is None else Peak(work.encode.allocated, work.encode.allocated)
    prefill, decode = (Peak(one.allocated, one.allocated) for one in (work.prefill, work.decode))
    return replace(work, encode=encode, prefill=prefill, decode=decode)


def _reserved(tape: Tape) -> int:
    allocator = AllocatorModel()
    allocator.play(tape)
    return allocator.reserved
