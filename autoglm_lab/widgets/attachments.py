"""Images and sounds that the browser sends, and the small pictures of them that the chat shows."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
from PIL import Image, UnidentifiedImageError

from autoglm_lab.engine.messages import SAMPLING_RATE, AudioPart, ImagePart, Message
from autoglm_lab.errors import MediaError
from autoglm_lab.units import MiB, format_bytes

LIMIT = 8 * MiB
"""Most bytes of the files of one message: what fits into one websocket message with room to spare."""
MOST_FILES = 8
_MOST_PIXELS = 50_000_000
_THUMB = 160
_PEAKS = 48


@dataclass(frozen=True)
class Attachment:
    """A file of a message.

    Attributes:
        kind: ``image`` or ``audio``.
        name: the file's name, for people.
        data: the file's bytes.
    """

    kind: Literal["image", "audio"]
    name: str
    data: bytes

    def part(self) -> dict[str, Any]:
        """As a part of an OpenAI-style message."""
        return {"type": self.kind, self.kind: self.data}

    def card(self) -> dict[str, Any]:
        """As the chat shows it: name, size, and a small picture or the outline of the sound."""
        card: dict[str, Any] = {"kind": self.kind, "name": self.name, "nbytes": len(self.data)}
        return card | (thumbnail(self.data) if self.kind == "image" else outline(self.data))


def cards_of(message: Message) -> list[dict[str, Any]]:
    """The media of a message that was submitted in code, as `Attachment.card` shows a file."""
    cards: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, ImagePart):
            cards.append({"kind": "image", "name": "image"} | _picture(part.image))
        elif isinstance(part, AudioPart):
            outline = _sound(np.abs(part.samples), len(part.samples) / SAMPLING_RATE)
            cards.append({"kind": "audio", "name": "audio", "nbytes": part.samples.nbytes} | outline)
    return cards


def read_attachments(files: Any, buffers: Sequence[memoryview | bytes]) -> list[Attachment]:
    """The attachments of one message.

    Args:
        files: ``[{"kind": "image" | "audio", "name": text}, ...]``, one for each buffer.
        buffers: their bytes.

    Raises:
        MediaError: too many or too large, or the list does not match the buffers.
    """
    if not isinstance(files, list) or len(files) != len(buffers):
        raise MediaError(f"{len(buffers)} files came with a list of something else; attach them again")
    if len(files) > MOST_FILES:
        raise MediaError(f"a message takes at most {MOST_FILES} files, these are {len(files)}")
    size = sum(memoryview(buffer).nbytes for buffer in buffers)
    if size > LIMIT:
        raise MediaError(
            f"the files of a message may have {format_bytes(LIMIT)} together, these have {format_bytes(size)}"
        )
    return [_attachment(file, bytes(buffer)) for file, buffer in zip(files, buffers, strict=True)]


def _attachment(file: Any, data: bytes) -> Attachment:
    kind = file.get("kind") if isinstance(file, Mapping) else None
    if kind not in ("image", "audio"):
        raise MediaError(f"a file is an image or audio, not {kind!r}")
    return Attachment(kind, Path(str(file.get("name") or kind)).name[:80], data)


def thumbnail(data: bytes) -> dict[str, Any]:
    """Width, height and a small PNG as a ``data:`` URI; empty where the picture cannot be read: the engine says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > _MOST_PIXELS:
                    return {}
                return _picture(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return {}


def _picture(image: Image.Image) -> dict[str, Any]:
    small, stream = image.convert("RGB"), io.BytesIO()
    small.thumbnail((_THUMB, _THUMB))
    small.save(stream, "PNG", optimize=True)
    picture = base64.b64encode(stream.getvalue()).decode()
    return {"width": image.width, "height": image.height, "thumb": f"data:image/png;base64,{picture}"}


def outline(data: bytes) -> dict[str, Any]:
    """Seconds of a sound and its loudness in `_PEAKS` steps of 0 to 1; empty where it cannot be read."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            seconds = sound.frames / sound.samplerate
            samples = sound.read(frames=int(60 * sound.samplerate), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError):
        return {}
    loud = np.abs(samples).max(axis=1) if len(samples) else np.zeros(1, np.float32)
    return _sound(loud, seconds)


def _sound(loud: np.ndarray[Any, np.dtype[np.float32]], seconds: float) -> dict[str, Any]:
    peaks = [float(stretch.max(initial=0)) for stretch in np.array_split(loud, _PEAKS)]
    most = max(*peaks, 1e-6)
    return {"seconds": seconds, "peaks": [round(peak / most, 2) for peak in peaks]}
