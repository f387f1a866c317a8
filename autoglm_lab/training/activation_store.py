"""Where a layer's activations wait for the backward pass: on the device, or in pinned host memory.

On CUDA copies run on a stream of their own: a layer's activations leave while the next layers compute, and come back
one layer before the backward pass needs them. All of their memory belongs to the computing stream, which waits for a
copy before it goes on in memory that the copy reads or writes: Python runs far ahead of the device, and an allocator
that is told of two streams would give nothing out again before both are done. On a CPU the host is the device, so a
copy is just that; the bytes are counted the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from autoglm_lab.schedule import LEAST_BYTES

# Copies on their way out at the same time; more would hold what they were to free.
_IN_FLIGHT = 4


class HostCopy:
    """One tensor that is on the host for now."""

    def __init__(self, store: ActivationStore, tensor: Tensor) -> None:
        self._store, self._device = store, tensor.device
        self._back: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        self._host: Tensor | None = store.leave(tensor)

    def prefetch(self) -> None:
        """Begin to bring it back."""
        if self._back is None and self._host is not None:
            self._back, self._ready = self._store.come(self._host, self._device)

    def let_go(self) -> None:
        """Keep the host's copy alone."""
        if self._ready is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ready)
        self._back = self._ready = None

    def release(self) -> Tensor | None:
        """Give up what it holds; the host's copy, to be used again."""
        self.let_go()
        host, self._host = self._host, None
        return host

    def get(self) -> Tensor:
        """The tensor on its device; the current stream waits for it."""
        self.prefetch()
        back = self._back
        assert back is not None
        if self._ready is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ready)
        return back


class ActivationStore:
    """Moves activations of chosen layers to the host and back.

    Args:
        device: where the model computes.
        least: bytes; smaller tensors stay.

    Attributes:
        moved: bytes brought to the host since the start.
        pinned: bytes of pinned memory that are held for it.
    """

    def __init__(self, device: torch.device, *, least: int = LEAST_BYTES) -> None:
        self._least, self._cuda = least, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._free: dict[int, list[Tensor]] = {}
        self._layers: dict[int, list[HostCopy]] = {}
        self._back: set[int] = set()
        self._skip: frozenset[int] = frozenset()
        self.moved, self.pinned = 0, 0

    def ignoring(self, tensors: Any) -> None:
        """Never move these: weights, which the backward pass finds where they are."""
        self._skip = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def begin_step(self) -> None:
        """Forget the copies of the step before; its pinned memory is used again."""
        self._let_go(0)
        for copies in self._layers.values():
            for copy in copies:
                self._recycle(copy)
        self._layers.clear()
        self._back.clear()

    def hooks(self, layer: int) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which what autograd saves belongs to ``layer`` and goes to the host."""
        copies = self._layers.setdefault(layer, [])
        known: dict[tuple[Any, ...], tuple[StorageWeakRef, HostCopy]] = {}

        def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
            address = tensor.untyped_storage().data_ptr()
            if tensor.nbytes < self._least or address in self._skip:
                return tensor.detach()  # itself would be a cycle that outlives a pass without backward
            version = tensor._version  # noqa: SLF001 - torch's only count of in-place writes
            key = (tensor.data_ptr(), version, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
            storage, copy = known.get(key, (None, None))
            # What was there before may have gone meanwhile, and another tensor may have come to the same address.
            if storage is None or copy is None or storage.expired():
                copy = HostCopy(self, tensor)
                known[key] = StorageWeakRef(tensor.untyped_storage()), copy
                copies.append(copy)
            kept = copy
            return lambda: self._fetch(layer, kept)

        def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
            return packed if isinstance(packed, Tensor) else packed()

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def put(self, layer: int, tensor: Tensor) -> Callable[[], Tensor]:
        """Keep one tensor of ``layer`` on the host; the result brings it back."""
        if tensor.nbytes < self._least:
            return lambda: tensor
        copy = HostCopy(self, tensor)
        self._layers.setdefault(layer, []).append(copy)
        return lambda: self._fetch(layer, copy)

    def leave(self, tensor: Tensor) -> Tensor:
        """Copy ``tensor`` to the host; on CUDA behind what the current stream has queued."""
        tensor = tensor.detach()
        self.moved += tensor.nbytes
        if self._stream is None:
            return tensor.clone()
        host = self._buffer(tensor)
        self._let_go(_IN_FLIGHT - 1)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
            event = self._stream.record_event()
        self._leaving.append((tensor, event))
        return host

    def come(self, host: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """Bring a copy back; on CUDA an event says when it is there."""
        if self._stream is None:
            return host, None
        self._let_go(0)
        back = torch.empty_like(host, device=device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # what computed in this memory before
        with torch.cuda.stream(self._stream):
            back.copy_(host, non_blocking=True)
            event = self._stream.record_event()
        return back, event

    def _let_go(self, most: int) -> None:
        """Hold no more than ``most`` tensors whose copies are on their way out."""
        while len(self._leaving) > most:
            tensor, event = self._leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(event)

    def _fetch(self, layer: int, copy: HostCopy) -> Tensor:
        """The layer's tensor; meanwhile the next layer that the backward pass comes to begins to come."""
        for passed in [index for index in self._back if index > layer]:
            self._back.discard(passed)
            for one in self._layers[passed]:
                one.let_go()
        self._bring(layer)
        tensor = copy.get()
        before = max((index for index in self._layers if index < layer), default=None)
        if before is not None:
            self._bring(before)
        return tensor

    def _bring(self, layer: int) -> None:
        if layer not in self._back:
            self._back.add(layer)
            for one in self._layers[layer]:
                one.prefetch()

    def _buffer(self, tensor: Tensor) -> Tensor:
        """Pinned memory of the tensor's shape, used again from step to step."""
        free = self._free.get(tensor.nbytes)
        if free:
            flat = free.pop()
        else:
            flat = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
            self.pinned += tensor.nbytes
        return flat.view(tensor.dtype).view(tensor.shape)

    def _recycle(self, copy: HostCopy) -> None:
        host = copy.release()
        if host is not None and self._stream is not None:
            flat = host.reshape(-1).view(torch.uint8)
            self._free.setdefault(flat.nbytes, []).append(flat)
