"""What the steps of a request are, and what they need: what `Activations` is asked and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoglm_lab.memory.kv.page_format import PageFormat


class UntracedError(Exception):
    """A step of this kind was not recorded yet, and may not be now."""


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

    def less_left(self, nbytes: int) -> Peak:
        """Where so many bytes come out of what is left."""
        return replace(self, left=max(0, self.left - nbytes))


@dataclass(frozen=True, slots=True)
class Steps:
    """What a request lets the engine do.

    Attributes:
        form: of the pages; None: the model keeps its own cache, and ``prefill`` and ``decode`` hold it.
        prompt: tokens of the prompt.
        kept: tokens in the cache at the end.
        chunk: most tokens of one step.
        batch: conversations that decode together.
        graphs: whether decode steps are captured.
        chunks: the spans that the prompt is read in, where they are known; None: all of it, by ``chunk``.
    """

    form: PageFormat | None
    prompt: int
    kept: int
    chunk: int
    batch: int
    graphs: bool
    chunks: tuple[tuple[int, int], ...] | None = None


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


@dataclass(frozen=True, slots=True)
class RequestCost:
    """What one real request needs. Bytes.

    Attributes:
        work: the peaks of its phases.
        read: its conversation's keys and values when the prompt is read, in whole pages; 0 where they are not on the
            device.
        kv: the same at the end.
    """

    work: Work
    read: int
    kv: int
