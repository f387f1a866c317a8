"""Pages that begin alike, found by what was read up to their end, so that conversations can hold them together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class PrefixIndex:
    """Pages by the key of everything that their keys and values depend on.

    It holds no page: one that no conversation holds any more is forgotten.
    """

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest run of ``keys``, from the first on, that is known."""
        found: list[int] = []
        for key in keys:
            if key not in self._pages:
                break
            found.append(self._pages[key])
        return found

    def add(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Let ``pages`` be found by ``keys``; keys that are known keep their page."""
        for key, page in zip(keys, pages, strict=True):
            if key not in self._pages and page not in self._keys:
                self._pages[key], self._keys[page] = page, key

    def forget(self, page: int) -> None:
        """A page was freed, or is about to be written."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]


def page_keys(
    ids: Sequence[int], blocks: Sequence[int] | None, media: Sequence[tuple[int, int, str]], page_tokens: int
) -> list[bytes]:
    """The keys of the full pages of a dialogue.

    A token's keys and values depend on every token before it, on the content behind media placeholders, and, inside a
    bidirectional block, on the rest of that block: so a page's key covers all of these.

    Args:
        ids: token ids ``[seq]``.
        blocks: the bidirectional block of each token ``[seq]``, -1 causal; None: all causal.
        media: start, length and content digest of each image or sound.
    """
    flat = np.asarray(ids, dtype=np.int64)
    grouped = np.full(len(flat), -1, dtype=np.int64) if blocks is None else np.asarray(blocks, dtype=np.int64)
    keys: list[bytes] = []
    before = b""
    for start in range(0, len(flat) - page_tokens + 1, page_tokens):
        end = start + page_tokens
        reach = end
        while reach < len(flat) and grouped[reach] != -1 and grouped[reach] == grouped[end - 1]:
            reach += 1
        digest = hashlib.sha256(before)
        digest.update(flat[start:reach].tobytes())
        digest.update(grouped[start:reach].tobytes())
        for at, length, content in media:
            if at < reach and at + length > start:
                digest.update(f"{at - start}:{content}".encode())
        before = digest.digest()
        keys.append(before)
    return keys
