"""Peaks of the engine's steps, from a trace of the model's own code on tensors without data."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.planning.allocator_model import AllocatorModel, Held
from autoglm_lab.memory.planning.encoder_tapes import EncoderTapes, Encoding, Medium, MediumInputs, blank
from autoglm_lab.memory.planning.layered_tape import LayeredTape, least_layers
from autoglm_lab.memory.planning.step_work import Peak, Steps, UntracedError, Work
from autoglm_lab.memory.planning.tape import Tape, TapeFamily
from autoglm_lab.memory.planning.traced_cache import alike
from autoglm_lab.memory.planning.traced_model import Kind, TracedModel
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.loading import Outline
from autoglm_lab.models.precision import precisions_of
from autoglm_lab.schedule import BATCH_SIZES, FEED_FORWARD_TOKENS, prefill_chunks

_LEAST_LAYERS = 4
_MOST_WHOLE = 16
"""Chunks of a prompt that are played one by one into transformers' own cache; of more, those that can hold the peak."""
_SHORT, _LONG = (64, 128, 256, 384), (1024, 1536, 2048, 3072)

_MOST_TAPES = 64


class Activations:
    """What the steps of one model need beside weights, keys and values. From any thread; each step is traced once.

    Attributes:
        notes: what could not be traced, one sentence each.
    """

    def __init__(self, outline: Outline, kind: Kind) -> None:
        self._outline, self._kind = outline, kind
        self._config: Any = outline.model.config
        self._families: dict[Any, TapeFamily | None] = {}
        self._tapes: dict[Any, Tape] = {}
        self._encoders = EncoderTapes(lambda: self._traced)
        self._media: dict[Any, MediumInputs] = {}
        self._failed: set[Any] = set()
        self._owned: dict[Any, tuple[Peak, int]] = {}
        self._models: dict[int, TracedModel] = {}
        self._before_trace: Callable[[], None] = _at_once
        self._lock = threading.RLock()
        self.notes: tuple[str, ...] = ()

    def work(self, steps: Steps, workload: Workload, media: Sequence[Medium]) -> Work:
        """The peaks of every phase; milliseconds where the same kind of step was traced before."""
        with self._lock:
            encoded = []
            for medium in media:
                found = self._encoding(medium, workload)
                if found is not None:
                    encoded += [(medium, found)] * (workload.images if medium == "vision" else 1)
            return self._told(steps, encoded)

    def request(
        self, steps: Steps, media: Sequence[MediumInputs], before_trace: Callable[[], None] | None = None
    ) -> Work:
        """The peaks of one real request.

        Args:
            media: what its encoders are given, one after the other.
            before_trace: called before each recording; None: nothing is recorded, and nobody waits for who records.

        Raises:
            UntracedError: something would have to be recorded first.
        """
        if not self._lock.acquire(blocking=before_trace is not None):
            raise UntracedError
        try:
            self._before_trace = _refuse if before_trace is None else before_trace
            found = ((one.medium, self._encoding(one.medium, one)) for one in media)
            return self._told(steps, [(medium, one) for medium, one in found if one is not None])
        finally:
            self._before_trace = _at_once
            self._lock.release()

    def _told(self, steps: Steps, encoded: Sequence[tuple[Medium, Encoding]]) -> Work:
        pictures = sum(nbytes for medium, (_, nbytes) in encoded if medium == "vision")
        try:
            work = self._work(steps, [one for _, one in encoded], pictures)
        except UntracedError:
            raise
        except Exception as error:  # noqa: BLE001 - any model's own code runs here
            self._note_failure("the steps of this model", error)
            work = Work(None, Peak(0, 0), Peak(0, 0))
        return work if self._kind == "cuda" else _uncached(work)

    def _work(self, steps: Steps, encoded: Sequence[Encoding], pictures: int) -> Work:
        allocator, features, encode = AllocatorModel(), 0, None
        for tape, nbytes in encoded:
            allocator.play(tape)  # what it keeps, its output, stays in the model of the allocator
            features += nbytes
        if encoded:
            encode = Peak(allocator.peak_allocated, allocator.reserved)
        if steps.form is None:
            return self._own(steps, encoded, encode, features, pictures)
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
        if steps.chunks is not None:
            return list(steps.chunks)
        if self._bidirectional:  # a turn of the user is read at once
            return [(0, steps.prompt)]
        return prefill_chunks(0, steps.prompt, steps.chunk)

    def _write(self, steps: Steps) -> int:
        form, batch = self._alike(steps.form), steps.batch
        family = self._family(
            ("decode", form, batch),
            lambda total: (1, total),
            lambda total: self._traced.decode(form, batch, total - 1),
            [(256,), (4096,)],
        )
        if family is None:
            key = "decode", form, batch, steps.kept
            tape = self._tape(key, lambda: self._traced.decode(form, batch, steps.kept - 1))
        else:
            tape = family.at(steps.kept)
        return tape.peak if self._kind == "cpu" else _reserved(tape)

    def _graphs(self, steps: Steps) -> int:
        pool, tried = AllocatorModel(), AllocatorModel()
        for size in captured_batches(steps.batch):
            tape = self._captured(steps.form, size)
            pool.play(tape)
            if size > 1:  # each step runs once before it is captured, in a stream whose blocks no other stream uses
                tried.play(tape)
        return pool.reserved + tried.reserved

    def _captured(self, form: PageFormat | None, size: int) -> Tape:
        form = self._alike(form)
        return self._tape(("captured", form, size), lambda: self._traced.decode(form, size, 255))

    def _prefill_tape(self, form: PageFormat | None, before: int, new: int) -> Tape:
        form = self._alike(form, before)
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
        key = "prefill", form, before, new
        return self._tape(key, lambda: self._traced.prefill(form, before, new, bidirectional=whole))

    def _alike(self, form: PageFormat | None, before: int = 1) -> PageFormat | None:
        return None if form is None else alike(form, self._kind, before)

    def _tape(self, key: Any, record: Callable[[], Tape]) -> Tape:
        """A tape of one length alone."""
        if key not in self._tapes:
            made = record()
            while len(self._tapes) >= _MOST_TAPES:
                del self._tapes[next(iter(self._tapes))]
            self._tapes[key] = made
        return self._tapes[key]

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

    def _encoding(self, medium: Medium, what: Workload | MediumInputs) -> Encoding | None:
        """What encoding one medium allocates; None where it cannot be recorded."""
        if isinstance(what, MediumInputs):
            key = what.key
        else:
            key = medium, what.image_size if medium == "vision" else what.audio_seconds
        if key in self._failed:
            return None
        try:
            return self._encoders.of(what if isinstance(what, MediumInputs) else self._blank(key, what))
        except UntracedError:
            raise
        except Exception as error:  # noqa: BLE001 - any model's own code runs here
            self._failed.add(key)
            self._note_failure(f"encoding with {medium}", error)
            return None

    def _blank(self, key: tuple[Any, ...], workload: Workload) -> MediumInputs:
        if key not in self._media:
            self._media[key] = blank(self._outline.processor(), self._outline.model, key[0], workload)
        return self._media[key]

    def _note_failure(self, what: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        note = f"{what} could not be traced, so their activations are not counted ({reason})"
        self.notes = self.notes if note in self.notes else (*self.notes, note)

    # models whose cache cannot be paged

    def _own(
        self, steps: Steps, encoded: Sequence[Encoding], encode: Peak | None, features: int, pictures: int
    ) -> Work:
        chunks = tuple(self._chunks(steps))
        if len(chunks) > _MOST_WHOLE:
            chunks = tuple(_telling(list(chunks)))
        # Every step writes the cache anew, a little longer: the second one finds blocks free that do not hold it.
        written = sorted({steps.prompt, steps.kept - 1})
        last = (*chunks, *((before, before + 1) for before in written if before >= steps.prompt))
        rows = pictures // (self._outline.dtype.itemsize * int(self._config.get_text_config().hidden_size))
        alone, kept = self._owning(last, rows)
        after, _ = self._owning(last, rows, tuple(tape for tape, _ in encoded)) if encoded else (alone, kept)
        left = max(0, after.reserved - features - alone.reserved)
        prefill, _ = self._owning(chunks, rows)
        return Work(encode, prefill, replace(alone, left=left), features, kept)

    def _owning(
        self, chunks: tuple[tuple[int, int], ...], rows: int, before: tuple[Tape, ...] = ()
    ) -> tuple[Peak, int]:
        """The peak of reading ``chunks`` into transformers' own cache, less the cache; and the cache's bytes.

        Args:
            rows: how many of the first tokens stand for images.
            before: what was encoded, and stays.
        """
        key = chunks, rows, before
        if key not in self._owned:
            depth = int(self._config.get_text_config().num_hidden_layers)
            figures = []
            for tape in self._tapes_of(chunks, depth, rows):
                allocator = AllocatorModel()
                for one in before:
                    allocator.play(one)
                allocator.play(tape)
                figures.append((tape.kept, allocator.peak_allocated, allocator.reserved))
            share = (depth - self._traced.layers) / max(1, self._deeper.layers - self._traced.layers)
            low, high = figures[0], figures[-1]
            kept, peak, reserved = (
                int(a) if len(figures) == 1 else int(a + share * (b - a)) for a, b in zip(low, high, strict=True)
            )
            self._owned[key] = Peak(max(0, peak - kept), max(0, reserved - kept)), kept
        return self._owned[key]

    def _tapes_of(self, chunks: tuple[tuple[int, int], ...], depth: int, rows: int = 0) -> list[Tape]:
        """The tape of the whole model; where it cannot be put together, those of two smaller ones to go on from."""
        spans = [(first, last - first) for first, last in chunks]
        kinds = self._kinds(depth)
        if all(kind == kinds[at % self._period] for at, kind in enumerate(kinds)):
            few = self._model_of(least_layers(depth, self._period))
            with contextlib.suppress(ValueError):
                key = "whole", chunks, rows
                return [self._tape(key, lambda: _whole(few, spans, rows).deepened(depth, self._period))]
        return [
            self._tape(("whole", chunks, rows, traced.layers), lambda traced=traced: _whole(traced, spans, rows).tape)  # type: ignore[misc]
            for traced in (self._traced, self._deeper)
        ]

    def _kinds(self, depth: int) -> list[str]:
        kinds = getattr(self._config.get_text_config(), "layer_types", None)
        return list(kinds) if kinds else ["full"] * depth

    # what is traced

    @property
    def _traced(self) -> TracedModel:
        return self._model_of(self._period)

    @property
    def _deeper(self) -> TracedModel:
        return self._model_of(2 * self._period)

    def _model_of(self, layers: int) -> TracedModel:
        """The model that is recorded; whoever asks for it is about to record."""
        self._before_trace()
        if layers not in self._models:
            made = TracedModel(
                self._config, self._outline.dtype, self._kind, layers, precisions=precisions_of(self._outline.model)
            )
            self._models[layers] = made
        return self._models[layers]

    @property
    def _period(self) -> int:
        """Layers after which every kind of layer has come."""
        kinds = self._kinds(1)
        first = next(count for count in range(1, len(kinds) + 1) if set(kinds[:count]) == set(kinds))
        return max(first, _LEAST_LAYERS)

    @property
    def _bidirectional(self) -> bool:
        return bool(getattr(self._config, "bidirectional_prompt", False))


def captured_batches(conversations: int) -> tuple[int, ...]:
    """Batches whose decode step is captured: one alone, and all together as far as there is a step for so many."""
    together = next((size for size in BATCH_SIZES if size >= conversations), 1)
    return (1,) if together == 1 else (1, together)


def _telling(chunks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The chunks that can hold the peak: the first two, the last, and one between them where it is longer."""
    if len(chunks) <= 3:
        return chunks
    told = [*chunks[:2], chunks[-1]]
    longest = max(chunks[2:-1], key=_length)
    return sorted([*told, longest]) if _length(longest) > max(map(_length, chunks[:2])) else told


def _whole(traced: TracedModel, spans: Sequence[tuple[int, int]], rows: int) -> LayeredTape:
    """With images among the tokens, or as text alone where the model takes them in another way."""
    try:
        return traced.whole(spans, rows)
    except Exception:
        if not rows:
            raise
        return traced.whole(spans)


def _length(chunk: tuple[int, int]) -> int:
    return chunk[1] - chunk[0]


def _at_once() -> None:
    """Record without asking."""


def _refuse() -> None:
    raise UntracedError


def _uncached(work: Work) -> Work:
    """Where what is freed goes back to the system, and nothing is kept for later."""
    encode = None if work.encode is None else Peak(work.encode.allocated, work.encode.allocated)
    prefill, decode = (Peak(one.allocated, one.allocated) for one in (work.prefill, work.decode))
    return replace(work, encode=encode, prefill=prefill, decode=decode)


def _reserved(tape: Tape) -> int:
    allocator = AllocatorModel()
    allocator.play(tape)
    return allocator.reserved
