"""Keys of pages: a digest of everything that a page's keys and values depend on."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

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
    dialogue = _Span(
        flat.tobytes(), tuple(sorted((start - first, length, content) for start, length, content in media))
    )
    grouped = None if blocks is None else np.asarray(blocks[first:], dtype=np.int64)
    within = _blocks_of(grouped)
    before, whole = keys[-1] if keys else b"", {(0, 0): b""}
    for start in range(0, len(flat) - page_tokens + 1, page_tokens):
        end = start + page_tokens
        digest = hashlib.sha256(before)
        dialogue.feed(digest, start, end)
        if grouped is not None:
            digest.update(grouped[start:end].tobytes())
        block = within(end - 1)
        if block[1] > end:
            if block not in whole:
                content = hashlib.sha256()
                dialogue.feed(content, *block)
                whole[block] = content.digest()
            digest.update(whole[block])
        before = digest.digest()
        keys.append(before)
    return keys


class _Span:
    """What is read: tokens as bytes, and the media behind some of them by start."""

    def __init__(self, tokens: bytes, media: tuple[tuple[int, int, str], ...]) -> None:
        self._tokens, self._media = tokens, media
        self._ends = [start + length for start, length, _ in media]

    def feed(self, digest: Any, start: int, end: int) -> None:
        """Add the tokens from ``start`` to ``end``, and the media that stand there."""
        digest.update(self._tokens[8 * start : 8 * end])
        for at, length, content in self._media[bisect.bisect_right(self._ends, start) :]:
            if at >= end:
                break
            digest.update(f"{at - start}+{length}:{content};".encode())


def _blocks_of(grouped: np.ndarray[Any, np.dtype[np.int64]] | None) -> Callable[[int], tuple[int, int]]:
    """Where the bidirectional block of a token begins and ends; ``(0, 0)`` for one that is in none."""
    if grouped is None or not len(grouped):
        return lambda _: (0, 0)
    starts = np.flatnonzero(np.append(True, grouped[1:] != grouped[:-1]))
    stops = [*starts[1:].tolist(), len(grouped)]

    def block(token: int) -> tuple[int, int]:
        number = int(np.searchsorted(starts, token, side="right")) - 1
        return (0, 0) if grouped[token] == -1 else (int(starts[number]), stops[number])

    return block
