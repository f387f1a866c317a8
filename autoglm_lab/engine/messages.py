"""OpenAI-style messages in: text, images and sounds read, checked and brought to what a processor takes.

Content parts: ``{"type": "text", "text": …}``, ``{"type": "image", "image": PIL | path | bytes}``,
``{"type": "audio", "audio": samples | path | bytes}`` and OpenAI's own ``image_url`` and ``input_audio`` with data
URIs. Nothing is fetched from the network.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from autoglm_lab.errors import MediaError, MessageError

SAMPLING_RATE = 16_000
ROLES = ("system", "user", "assistant")
PARTS = ("text", "image", "audio", "image_url", "input_audio")


@dataclass(frozen=True)
class Limits:
    """What one medium may be at most. Checked before it is decoded.

    Attributes:
        image_pixels: width x height of an image.
        audio_seconds: length of a sound.
        media_bytes: size of an encoded image or sound.
    """

    image_pixels: int = 40_000_000
    audio_seconds: float = 600.0
    media_bytes: int = 50_000_000


@dataclass(frozen=True)
class TextPart:
    """Text of a message."""

    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """``image`` is RGB; ``digest`` identifies its pixels."""

    image: Image.Image
    digest: str


@dataclass(frozen=True, eq=False)
class AudioPart:
    """``samples``: float32 ``[samples]``, 16 kHz mono, -1..1; ``digest`` identifies them."""

    samples: np.ndarray[Any, np.dtype[np.float32]]
    digest: str


Part = TextPart | ImagePart | AudioPart


@dataclass(frozen=True)
class Message:
    """What one side said, with its media in place."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    def for_processor(self) -> dict[str, Any]:
        """As transformers' ``apply_chat_template`` takes it."""
        return {"role": self.role, "content": [_for_processor(part) for part in self.parts]}


def read_messages(raw: Sequence[Mapping[str, Any]], limits: Limits | None = None) -> tuple[Message, ...]:
    """Read and check messages.

    Raises:
        MessageError: not a list of messages with a known role and known content parts.
        MediaError: an image or a sound that cannot be read, or is over its limit.
    """
    if isinstance(raw, Mapping | str) or not isinstance(raw, Sequence):
        raise MessageError(f"messages are a list of {{'role', 'content'}}, not {type(raw).__name__}")
    if not raw:
        raise MessageError("there are no messages: give at least one with role 'user'")
    return tuple(_read_message(message, limits or Limits()) for message in raw)


def media(messages: Sequence[Message], kind: type[ImagePart | AudioPart]) -> list[Any]:
    """Every image or sound of a dialogue, in order."""
    return [part for message in messages for part in message.parts if isinstance(part, kind)]


def image_size(image: Any) -> tuple[int, int]:
    """Width and height in pixels of an image as a message takes it.

    Raises:
        MediaError: it cannot be read.
    """
    (message,) = read_messages([{"role": "user", "content": [{"type": "image", "image": image}]}])
    (part,) = media([message], ImagePart)
    width, height = part.image.size
    return width, height


def audio_part(samples: Any) -> AudioPart:
    """A sound from float samples ``[samples]``, 16 kHz mono."""
    array = np.ascontiguousarray(np.asarray(samples, dtype=np.float32))
    if array.ndim != 1:
        raise MediaError(f"a sound is mono samples of shape [samples], not {list(array.shape)}")
    if not np.isfinite(array).all():
        raise MediaError("the sound has samples that are not finite numbers")
    return AudioPart(array, hashlib.sha256(array.tobytes()).hexdigest())


def _read_message(message: Mapping[str, Any], limits: Limits) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise MessageError(f"a message is {{'role', 'content'}}, not {type(message).__name__}")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise MessageError(f"unknown role {role!r}: use {', '.join(ROLES)}")
    if isinstance(content, str) and (content or role != "user"):
        return Message(role, (TextPart(content),))
    if not isinstance(content, Sequence):
        raise MessageError(f"the content of a message is text or a list of parts, not {type(content).__name__}")
    if role == "user" and not content:
        raise MessageError("the user's message is empty: give text, an image or a sound")
    return Message(role, tuple(_read_part(part, limits) for part in content))


def _read_part(part: Mapping[str, Any], limits: Limits) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    try:
        if kind == "text":
            return TextPart(str(part["text"]))
        if kind == "image":
            return _read_image(part["image"], limits)
        if kind == "image_url":
            url = part["image_url"]
            return _read_image(_from_data_uri(url["url"] if isinstance(url, Mapping) else url, "image", limits), limits)
        if kind == "audio":
            return _read_audio(part["audio"], limits)
        if kind == "input_audio":
            return _read_audio(_from_base64(part["input_audio"]["data"], "sound", limits), limits)
    except (KeyError, TypeError) as error:
        raise MessageError(f"the content part of type {kind!r} is incomplete: {error}") from None
    raise MessageError(f"unknown content part {kind!r}: use {', '.join(PARTS)}")


def _read_image(source: Any, limits: Limits) -> ImagePart:
    try:
        image = source if isinstance(source, Image.Image) else Image.open(_open(source, limits, "image"))
        pixels = image.width * image.height
        if pixels > limits.image_pixels:
            raise MediaError(f"the image has {pixels:,} pixels, the limit is {limits.image_pixels:,}: make it smaller")
        rgb = image.convert("RGB")
    except UnidentifiedImageError:
        raise MediaError(f"cannot read the image{_name(source)}: it is no PNG, JPEG or other known picture") from None
    except (Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise MediaError(f"cannot read the image{_name(source)}: {error}") from None
    digest = hashlib.sha256(rgb.tobytes() + repr(rgb.size).encode()).hexdigest()
    return ImagePart(rgb, digest)


def _read_audio(source: Any, limits: Limits) -> AudioPart:
    if isinstance(source, str | Path | bytes | bytearray | memoryview):
        samples, rate = _decode_audio(source, limits)
    elif isinstance(source, tuple) and len(source) == 2:
        samples, rate = np.asarray(source[0], dtype=np.float32), int(source[1])
    else:
        samples, rate = np.asarray(source, dtype=np.float32), SAMPLING_RATE
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if samples.ndim != 1 or samples.size == 0:
        raise MediaError(f"a sound is mono samples of shape [samples], not {list(samples.shape)}")
    if rate <= 0 or samples.size / rate > limits.audio_seconds:
        seconds = samples.size / max(rate, 1)
        raise MediaError(f"the sound lasts {seconds:.0f} s at {rate} Hz, the limit is {limits.audio_seconds:.0f} s")
    if rate != SAMPLING_RATE:
        import soxr

        samples = soxr.resample(samples, rate, SAMPLING_RATE)
    return audio_part(samples)


def _decode_audio(source: Any, limits: Limits) -> tuple[Any, int]:
    import soundfile

    try:
        with soundfile.SoundFile(_open(source, limits, "sound")) as file:
            if file.frames / file.samplerate > limits.audio_seconds:
                raise MediaError(
                    f"the sound lasts {file.frames / file.samplerate:.0f} s, the limit is {limits.audio_seconds:.0f} s"
                )
            return file.read(dtype="float32", always_2d=True), file.samplerate
    except soundfile.SoundFileError as error:
        reason = str(error).rpartition(": ")[2]
        raise MediaError(f"cannot read the sound{_name(source)}: {reason}") from None


def _open(source: Any, limits: Limits, what: str) -> io.BytesIO:
    if isinstance(source, str) and source.startswith("data:"):
        source = _from_data_uri(source, what, limits)
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise MediaError(f"there is no {what} file {str(source)!r}; URLs are not fetched, give a path or the bytes")
        if path.stat().st_size > limits.media_bytes:
            raise MediaError(f"the {what} file has {path.stat().st_size:,} bytes, the limit is {limits.media_bytes:,}")
        return io.BytesIO(path.read_bytes())
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) > limits.media_bytes:
            raise MediaError(f"the {what} has {len(source):,} bytes, the limit is {limits.media_bytes:,}")
        return io.BytesIO(bytes(source))
    raise MediaError(f"cannot read {type(source).__name__} as {what}: give a path, bytes, or the decoded {what}")


def _from_data_uri(url: str, what: str, limits: Limits) -> bytes:
    if not isinstance(url, str) or not url.startswith("data:"):
        raise MediaError(f"the {what} must be a data URI (data:…;base64,…): other URLs are not fetched")
    header, comma, body = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise MediaError(f"the {what}'s data URI is not base64")
    return _from_base64(body, what, limits)


def _from_base64(text: str, what: str, limits: Limits) -> bytes:
    if len(text) * 3 // 4 > limits.media_bytes:
        raise MediaError(f"the {what} has {len(text) * 3 // 4:,} bytes, the limit is {limits.media_bytes:,}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"the {what} is not valid base64: {error}") from None


def _for_processor(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ImagePart):
        return {"type": "image", "image": part.image}
    return {"type": "audio", "audio": part.samples}


def _name(source: Any) -> str:
    return f" {str(source)!r}" if isinstance(source, str | Path) and not str(source).startswith("data:") else ""
