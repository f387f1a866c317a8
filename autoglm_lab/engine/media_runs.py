"""Where the images and sounds of a dialogue stand among its tokens."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autoglm_lab.engine.messages import AudioPart, ImagePart, Message, media
from autoglm_lab.errors import MessageError

MediaKind = Literal["image", "audio"]

_PLACEHOLDERS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("image_token_id", "image_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}
# Where a family keeps the number of its placeholder with the encoder instead.
_PARTS: dict[MediaKind, str] = {"image": "vision_config", "audio": "audio_config"}


@dataclass(frozen=True)
class MediaRun:
    """One image or sound in the prompt: tokens ``[start, start + length)`` and its content's digest.

    Attributes:
        places: which of these tokens stand for features, counted from ``start``, where others are between them (the
            ends of an image's rows, marks before its tiles); None: all do.
    """

    kind: MediaKind
    start: int
    length: int
    digest: str
    places: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def span(self) -> tuple[int, int, str]:
        return self.start, self.length, self.digest

    @property
    def features(self) -> int:
        """Tokens that stand for features."""
        return self.length if self.places is None else len(self.places)

    def features_before(self, token: int) -> int:
        """How many of them stand before a token of the prompt."""
        within = max(0, min(token - self.start, self.length))
        return within if self.places is None else bisect_left(self.places, within)


def media_runs(config: Any, processor: Any, ids: Sequence[int], messages: Sequence[Message]) -> tuple[MediaRun, ...]:
    """The media of ``messages`` in the prompt ``ids``, in order.

    Where the tokens do not tell one medium from the next, all of a kind are one run, whose digest is that of all.

    Args:
        config: the model's; it numbers the placeholder tokens.
        processor: asked how many tokens each medium takes, where it can tell.

    Raises:
        MessageError: the prompt has no placeholder for a kind of media that the dialogue has.
    """
    runs: list[MediaRun] = []
    parts: dict[MediaKind, type[ImagePart | AudioPart]] = {"image": ImagePart, "audio": AudioPart}
    for kind, part in parts.items():
        found = media(messages, part)
        if not found:
            continue
        token = _placeholder(config, kind)
        places = [index for index, value in enumerate(ids) if value == token]
        if not places:
            raise MessageError(
                f"the dialogue has {len(found)} {kind} part(s), but this model's prompt shows none: "
                f"it may not take {kind} at all; wb.engine.capabilities.modalities lists what it takes"
            )
        runs += _told_apart(kind, places, found, processor)
    return tuple(sorted(runs, key=lambda run: run.start))


def _placeholder(config: Any, kind: MediaKind) -> int | None:
    for part in (config, getattr(config, _PARTS[kind], None)):
        for name in _PLACEHOLDERS[kind]:
            if getattr(part, name, None) is not None:
                return int(getattr(part, name))
    return None


def _told_apart(kind: MediaKind, places: list[int], found: list[Any], processor: Any) -> list[MediaRun]:
    digests = [medium.digest for medium in found]
    spans = _spans(places)
    counts = [len(span) for span in spans]
    if len(found) == 1:
        counts = [len(places)]
    elif len(spans) != len(found):
        counts = _counted(kind, found, processor)
        if sum(counts) != len(places):
            counts, digests = [len(places)], [hashlib.sha256("".join(digests).encode()).hexdigest()]
    runs, first = [], 0
    for count, digest in zip(counts, digests, strict=True):
        own, first = places[first : first + count], first + count
        start, length = own[0], own[-1] + 1 - own[0]
        offsets = None if length == count else tuple(place - start for place in own)
        runs.append(MediaRun(kind, start, length, digest, offsets))
    return runs


def _counted(kind: MediaKind, found: list[Any], processor: Any) -> list[int]:
    """Placeholders of each medium, as the processor counts them; empty where it does not."""
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        return []
    sizes: dict[str, Any] = (
        {"image_sizes": [(medium.image.height, medium.image.width) for medium in found]}
        if kind == "image"
        else {"audio_lengths": [len(medium.samples) for medium in found]}
    )
    try:
        counted = count(**sizes)
    except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError):
        return []
    numbers = [int(number) for number in counted.get(f"num_{kind}_tokens") or ()]
    return numbers if len(numbers) == len(found) and all(numbers) else []


def _spans(places: Sequence[int]) -> list[list[int]]:
    """Places one after the other, by run."""
    spans: list[list[int]] = []
    for place in places:
        if spans and spans[-1][-1] == place - 1:
            spans[-1].append(place)
        else:
            spans.append([place])
    return spans
