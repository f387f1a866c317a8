"""Keys of pages: a digest of everything that a page's keys and values depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def page_keys(
    ids: Sequence[int],
    blocks: Sequence[int] | None,
    media: Sequence[tuple[int, int, str]],
    page_tokens: int,
    known: Sequence[bytes] = (),
) -> list[bytes]:
    """The keys of the full pages of a dialogue.

    A token's keys and values depend on every token before it, on the content behind media placeholders, and, inside a
    bidirectional block, on the rest of that block: so a page's key covers all of these.

    Args:
        ids: token ids ``[seq]``.
        blocks: the bidirectional block of each token ``[seq]``, -1 causal; None: all causal.
        media: start, length and content digest of each image or sound.
        known: the keys of the first pages, where those are known to be the same; only what follows is read.
    """
    keys = list(known)
    first = len(keys) * page_tokens
    flat = np.asarray(ids[first:], dtype=np.int64)
    grouped = np.full(len(flat), -1, dtype=np.int64) if blocks is None else np.asarray(blocks[first:], dtype=np.int64)
    ends = _block_ends(grouped)
    tokens, groups = flat.tobytes(), grouped.tobytes()
    waiting = sorted((start - first, length, content) for start, length, content in media)
    before = keys[-1] if keys else b""
    for start in range(0, len(flat) - page_tokens + 1, page_tokens):
        reach = int(ends[start + page_tokens - 1])
        digest = hashlib.sha256(before)
        digest.update(tokens[8 * start : 8 * reach])
        if blocks is not None:
            digest.update(groups[8 * start : 8 * reach])
        while waiting and waiting[0][0] + waiting[0][1] <= start:
            waiting.pop(0)
        for at, length, content in waiting:
            if at >= reach:
                break
            digest.update(f"{at - start}+{length}:{content};".encode())
        before = digest.digest()
        keys.append(before)
    return keys


def _block_ends(grouped: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """For each token, the end of what it sees at least: of its block where it is in one, else itself."""
    places = np.arange(len(grouped))
    if not len(grouped):
        return places
    last = np.append(grouped[1:] != grouped[:-1], True)
    stops = np.flatnonzero(last) + 1
    ends = stops[np.searchsorted(stops, places, side="right")]
    return np.where(grouped == -1, places + 1, ends)
