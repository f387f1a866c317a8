"""Reading the bytes of files in several threads: one thread reads a warm file far slower than a GPU's bus takes it."""

from __future__ import annotations

import ctypes
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoglm_lab.errors import LoadError
from autoglm_lab.memory.residency.staging import Lane, Staging
from autoglm_lab.models.checkpoint import FileTensor
from autoglm_lab.units import format_bytes

_ALONE = 64 << 20
"""Fewer bytes than this are read by the calling thread: starting others would take longer."""
_TELL = 0.1
Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a file, and where its values go.

    Attributes:
        offset: of its first byte in the file.
        target: flat and contiguous, as many values as the piece has.
    """

    source: FileTensor
    offset: int
    target: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.target.numel() * self.source.dtype.itemsize


def pieces_of(source: FileTensor, target: Tensor, chunk: int) -> Iterator[Piece]:
    """``source`` cut into pieces of at most ``chunk`` bytes; ``target`` is contiguous."""
    flat, step = target.view(-1), max(1, chunk // source.dtype.itemsize)
    for begin in range(0, flat.numel(), step):
        yield Piece(source, source.offset + begin * source.dtype.itemsize, flat[begin : begin + step])


def read(pieces: Iterable[Piece], staging: Staging, progress: Progress) -> None:
    """Read every piece to its target. On a GPU the last copies may still be under way on the current stream.

    What fails, or an interrupt, ends every thread before it is raised; nothing is written to a target after that.

    Args:
        staging: entered by the caller, of the targets' device.
        progress: called by this thread with the bytes of targets that are filled so far in addition.

    Raises:
        LoadError: a file is gone, or shorter than its header said.
        MemoryError: the host has no room for the buffers.
    """
    listed = list(pieces)
    nbytes = sum(piece.nbytes for piece in listed)
    threads = 1 if nbytes < _ALONE else min(staging.lanes, os.cpu_count() or 1, len(listed))
    stream = torch.cuda.current_stream(staging.device) if staging.device.type == "cuda" else None
    job = _Job(listed, staging, stream)
    try:
        if threads == 1:
            for count in job.work(0):
                progress(count)
        else:
            _in_threads(job, threads, progress)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # whose variables view buffers and targets
        raise
    finally:
        job.close()


class _Job:
    """The pieces of one reading, handed out one by one."""

    def __init__(self, pieces: list[Piece], staging: Staging, stream: torch.cuda.Stream | None) -> None:
        self._pieces, self._staging, self._stream = iter(pieces), staging, stream
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self.stopped = False

    def prepare(self, count: int) -> None:
        """Make the lanes of ``count`` threads."""
        for number in range(count):
            self._staging.lane(number)

    def work(self, number: int) -> Iterator[int]:
        """Read pieces until there are none, as thread ``number``; yields the bytes of each target."""
        lane = self._staging.lane(number)
        while (taken := self._take()) is not None:
            piece, handle = taken
            with torch.inference_mode(mode=False), torch.no_grad(), torch.cuda.stream(self._stream):
                if not self._staging.staged and piece.source.dtype == piece.target.dtype:
                    _read(handle, piece, piece.target)
                else:
                    self._read_through(lane, handle, piece)
            yield piece.target.numel() * piece.target.element_size()

    def _read_through(self, lane: Lane, handle: int, piece: Piece) -> None:
        buffer = lane.next(piece.nbytes)
        _read(handle, piece, buffer)
        self._staging.give(buffer.view(piece.source.dtype), piece.target)
        lane.given(self._stream)

    def _take(self) -> tuple[Piece, int] | None:
        with self._lock:
            piece = None if self.stopped else next(self._pieces, None)
            if piece is None:
                return None
            path = piece.source.path
            if path not in self._files:
                try:
                    self._files[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise LoadError(f"cannot read the weights in {path}: {error.strerror}") from None
            return piece, self._files[path]

    def close(self) -> None:
        for handle in self._files.values():
            os.close(handle)


def _in_threads(job: _Job, count: int, progress: Progress) -> None:
    """Run ``job`` in threads; this one tells the progress, and waits for all of them whatever happens."""
    done, failed, changed = [0], list[BaseException](), threading.Condition()

    def work(number: int) -> None:
        try:
            for nbytes in job.work(number):
                with changed:
                    done[0] += nbytes
        except BaseException as error:  # noqa: BLE001 - the thread that waits raises it
            job.stopped = True
            traceback.clear_frames(error.__traceback__)  # whose variables view buffers and targets
            failed.append(error)
        finally:
            with changed:
                running.discard(number)
                changed.notify()

    running = set(range(count))
    threads = [threading.Thread(target=work, args=(number,), name="autoglm-lab reader") for number in range(count)]
    job.prepare(count)
    told = 0
    try:
        for thread in threads:
            thread.start()
        while True:
            with changed:
                if running:
                    changed.wait(_TELL)
                ended = not running
                now = done[0]
            if now > told:
                progress(now - told)
                told = now
            if ended:
                break
    except BaseException:
        job.stopped = True
        raise
    finally:
        _join(threads)
    if failed:
        raise failed[0]


def _join(threads: Iterable[threading.Thread]) -> None:
    """Wait for every thread, also when interrupted meanwhile: they still write to memory that is about to go."""
    interrupted: KeyboardInterrupt | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted


def _read(handle: int, piece: Piece, target: Tensor) -> None:
    nbytes = piece.nbytes
    if nbytes == 0:
        return
    memory = memoryview((ctypes.c_char * nbytes).from_address(target.data_ptr())).cast("B")
    done = 0
    while done < nbytes:
        try:
            count = os.preadv(handle, [memory[done:]], piece.offset + done)
        except OSError as error:
            raise LoadError(f"cannot read the weights in {piece.source.path}: {error.strerror}") from None
        if count == 0:
            end = format_bytes(piece.offset + done)
            raise LoadError(
                f"{piece.source.path} became shorter since the model was resolved: it ends at {end}. Fetch it again"
            )
        done += count
