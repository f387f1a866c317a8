"""Outputs of the image and audio encoders, kept by content: a medium that was seen before is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator

from torch import Tensor

from autoglm_lab.memory.ledger import Row

# What CUDA's allocator rounds to.
_GRAIN = 512


class FeatureStore:
    """Encoder outputs within a limit of bytes, least recently used dropped first. Only the engine's thread changes it.

    Attributes:
        limit: bytes; see `obey`.
        hits, misses: of `get`, since the start.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit, self.hits, self.misses = limit, 0, 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._nbytes = 0

    def has(self, key: Hashable) -> bool:
        """Whether `get` would find it; it does not count as a use."""
        return key in self._kept

    def has_any(self, beginning: str) -> bool:
        """Whether features are kept under a key that begins so."""
        return any(str(key).startswith(beginning) for key in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, as the allocator gives them."""
        return self._nbytes

    def get(self, key: Hashable) -> Tensor | None:
        """The features put under ``key``, or None."""
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
            self._kept.move_to_end(key)
        return found

    def put(self, key: Hashable, features: Tensor) -> None:
        """Keep ``features``; a part of a larger tensor is copied, so that only its own bytes stay.

        Features larger than the whole limit are not kept.
        """
        if _nbytes(features.nbytes) > self.limit:
            return
        old = self._kept.pop(key, None)
        if old is not None:
            self._nbytes -= _nbytes(old.nbytes)
        self.free(self._nbytes + _nbytes(features.nbytes) - self.limit)
        whole = features.untyped_storage().nbytes() == features.nbytes
        self._kept[key] = features.detach() if whole else features.detach().clone()
        self._nbytes += _nbytes(features.nbytes)

    def obey(self, limit: int) -> None:
        """Keep at most ``limit`` bytes, at once."""
        self.limit = limit
        self.free(self._nbytes - limit)

    def free(self, nbytes: int) -> int:
        """Drop features until ``nbytes`` are free, or none is left. Returns bytes freed, into the allocator's cache."""
        before = self._nbytes
        while self._kept and before - self._nbytes < nbytes:
            _, dropped = self._kept.popitem(last=False)
            self._nbytes -= _nbytes(dropped.nbytes)
        return before - self._nbytes

    def clear(self) -> int:
        """Drop everything. Returns bytes freed, into the allocator's cache."""
        return self.free(self._nbytes)

    def holdings(self) -> Iterator[Row]:
        nbytes, count = self._nbytes, len(self._kept)
        if nbytes:
            counts = f"outputs of the encoders for {count} image(s) and sound(s), kept for when they are seen again"
            yield Row("encoder outputs", "owner", "device", nbytes, counts, within="allocator")


def _nbytes(nbytes: int) -> int:
    return -(-nbytes // _GRAIN) * _GRAIN
