"""How many tokens an image takes of a prompt, and making it take fewer.

Families that resize an image to a number of pixels between two bounds (Glm4v, Qwen-VL) can be told a lower upper bound;
others take the same number for every image, or cut it into tiles of one size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

_Edges = dict[str, int]
_first: WeakKeyDictionary[Any, _Edges] = WeakKeyDictionary()
"""The bounds of an image processor as they were before anything was limited."""
_PROBE = 1024
_UNKNOWN = (NotImplementedError, AttributeError, TypeError, ValueError, KeyError)


def image_tokens(processor: Any, size: tuple[int, int]) -> int | None:
    """Tokens of an image under the limit that holds.

    Args:
        processor: of the model.
        size: ``(width, height)`` in pixels.

    Returns:
        None where the processor does not tell, or takes no images.
    """
    images = getattr(processor, "image_processor", None)
    width, height = size
    try:
        if _bounds(images) is not None:
            return _count(images, width, height)
        return int(processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0])  # noqa: SLF001 - what transformers' own servers ask
    except _UNKNOWN:
        fixed = getattr(processor, "image_seq_length", None)
        return fixed if isinstance(fixed, int) and images is not None else None


def limit_image_tokens(processor: Any, most: int | None) -> str:
    """Let an image take at most so many tokens from now on: larger ones are made smaller before they are encoded.

    Images are never enlarged. A strip whose sides differ more than ``most`` times may take more.

    Args:
        most: tokens; None: as the processor came.

    Returns:
        Why this model cannot obey; empty where it does.
    """
    images = getattr(processor, "image_processor", None)
    came = _first.get(images) if images is not None and _bounds(images) else None
    if came is None and most is None:
        return ""
    if images is None:
        return "max_image_tokens does nothing: this model takes no images"
    if _bounds(images) is None:
        each = image_tokens(processor, (224, 224))
        takes = "its processor fixes how many tokens an image takes" if each is None else f"fixed at {each:,} an image"
        return f"max_image_tokens does nothing: {takes}"
    images.size = edges_for(images, most)
    return ""


def image_edges(processor: Any) -> Callable[[int], dict[str, int]] | None:
    """Makes the bounds in pixels from the most tokens that an image may take; None: the processor has no bounds."""
    images = getattr(processor, "image_processor", None)
    return None if images is None or _bounds(images) is None else partial(edges_for, images)


def edges_for(images: Any, most: int | None) -> _Edges:
    """The bounds, in pixels, that let an image take at most ``most`` tokens; None: those that the processor had."""
    bounds = _bounds(images)
    assert bounds is not None
    came = _first.setdefault(images, bounds)
    if most is None:
        return dict(came)
    longest = min(came["longest_edge"], most * _pixels_of_a_token(images))
    return {"shortest_edge": min(came["shortest_edge"], longest), "longest_edge": longest}


def resized(processor: Any, size: tuple[int, int], most: int | None) -> tuple[int, int]:
    """``(width, height)`` of an image that takes as many tokens as one of ``size`` does under the limit ``most``.

    For a plan under another policy than the one that holds: the processor stays as it is.
    """
    tokens, plain = limited_tokens(processor, size, most), limited_tokens(processor, size, None)
    if tokens is None or plain is None or tokens >= plain:
        return size
    width, height = size
    shrink = (tokens * _side(processor.image_processor) ** 2 / (width * height)) ** 0.5
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def limited_tokens(processor: Any, size: tuple[int, int], most: int | None) -> int | None:
    """Tokens that an image would take under the limit ``most``, whatever holds now; None: it cannot be limited."""
    images = getattr(processor, "image_processor", None)
    if images is None or _bounds(images) is None:
        return None
    limited = copy.copy(images)
    limited.size = edges_for(images, most)
    try:
        return _count(limited, *size)
    except _UNKNOWN:
        return None


def _bounds(images: Any) -> _Edges | None:
    size = getattr(images, "size", None)
    if size is None or not all(hasattr(images, name) for name in ("patch_size", "merge_size")):
        return None
    if not hasattr(images, "get_number_of_image_patches"):
        return None
    try:
        shortest, longest = size["shortest_edge"], size["longest_edge"]
    except (KeyError, TypeError):
        return None
    if shortest is None or longest is None:
        return None
    return {"shortest_edge": int(shortest), "longest_edge": int(longest)}


def _count(images: Any, width: int, height: int) -> int:
    patches = int(images.get_number_of_image_patches(height, width, {}))
    return patches // int(images.merge_size) ** 2


def _side(images: Any) -> int:
    return int(images.patch_size) * int(images.merge_size)


def _pixels_of_a_token(images: Any) -> int:
    """Some families count an image's pixels once, others once for each frame that a patch spans: asked, not known."""
    pixels = _side(images) ** 2
    probe = copy.copy(images)
    probe.size = {"shortest_edge": 1, "longest_edge": _PROBE * pixels}
    large = 4 * _side(images) * int(_PROBE**0.5)
    return pixels * max(1, round(_PROBE / _count(probe, large, large)))
