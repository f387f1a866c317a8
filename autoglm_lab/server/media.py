"""A client's messages brought to what the engine takes: media only as data, or from hosts that are allowed by name.

The engine's own messages may name files. Those of a client never do: what reaches the engine from here is text,
decoded pictures and sounds.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, UnidentifiedImageError

from autoglm_lab.errors import MediaError, MessageError
from autoglm_lab.server.fetch import fetch
from autoglm_lab.server.settings import ServerSettings

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_RATES = (4_000, 384_000)
_ROLES = {"developer": "system"}
_PARTS = ("text", "image_url", "input_audio")


def read_dialogue(messages: Sequence[Mapping[str, Any]], settings: ServerSettings) -> list[dict[str, Any]]:
    """Messages as `LocalEngine.submit` takes them. It decodes, and may fetch: call it beside the event loop.

    Raises:
        MessageError: they are not messages, or are over the limits of text and media of one request.
        MediaError: an image or a sound cannot be read, is over its limit, or would have to be fetched from elsewhere.
    """
    read: list[dict[str, Any]] = []
    chars = count = 0
    for message in messages:
        parts = _parts(message)
        chars += sum(len(part["text"]) for part in parts if part["type"] == "text")
        count += sum(part["type"] != "text" for part in parts)
        role = message.get("role")
        read.append({"role": _ROLES.get(str(role), role), "content": parts})
    if chars > settings.prompt_chars:
        raise MessageError(f"the text has {chars:,} characters, the limit is {settings.prompt_chars:,}: shorten it")
    if count > settings.media:
        raise MessageError(f"there are {count} images and sounds, the limit is {settings.media} a request")
    for message in read:
        message["content"] = [_decoded(part, settings) for part in message["content"]]
    return read


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if content is None and message.get("role") == "assistant":
        return []
    if not isinstance(content, Sequence):
        raise MessageError(f"the content of a message is text or a list of parts, not {type(content).__name__}")
    return [_checked(part) for part in content]


def _checked(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _PARTS:
        shown = repr(kind)[:40]
        raise MessageError(f"unknown content part {shown}: use {', '.join(_PARTS)}")
    value = part.get(kind)
    if kind == "text" and isinstance(value, str):
        return {"type": "text", "text": value}
    if kind == "image_url":
        url = value.get("url") if isinstance(value, Mapping) else value
        if isinstance(url, str):
            return {"type": kind, "url": url}
    if kind == "input_audio" and isinstance(value, Mapping) and isinstance(value.get("data"), str):
        return {"type": kind, "data": value["data"]}
    raise MessageError(f"the content part of type {kind!r} is incomplete: its text, url or data is missing")


def _decoded(part: dict[str, Any], settings: ServerSettings) -> dict[str, Any]:
    if part["type"] == "image_url":
        return {"type": "image", "image": _image(_bytes_of(part["url"], "image", settings), settings)}
    if part["type"] == "input_audio":
        data = part["data"]
        raw = _bytes_of(data, "sound", settings) if ":" in data[:8] else _base64(data, "sound", settings)
        _check_sound(raw, settings)
        return {"type": "audio", "audio": raw}
    return part


def _bytes_of(url: str, what: str, settings: ServerSettings) -> bytes:
    if not url.startswith("data:"):
        return fetch(url, settings.media_domains, settings.media_bytes, what)
    header, comma, body = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise MediaError(f"the {what}'s data URI is not base64: write data:…;base64,…")
    return _base64(body, what, settings)


def _base64(text: str, what: str, settings: ServerSettings) -> bytes:
    if len(text) * 3 // 4 > settings.media_bytes:
        raise MediaError(f"the {what} has {len(text) * 3 // 4:,} bytes, the limit is {settings.media_bytes:,}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"the {what} is not valid base64") from None


def _image(raw: bytes, settings: ServerSettings) -> Image.Image:
    """The picture. Its size is known, and checked, before a pixel is decoded."""
    try:
        with Image.open(io.BytesIO(raw), formats=_FORMATS) as image:
            pixels = image.width * image.height
            rgb = None if pixels > settings.image_pixels else image.convert("RGB")
    except UnidentifiedImageError:
        raise MediaError(f"cannot read the image: it is no {', '.join(_FORMATS)}") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, OverflowError) as error:
        raise MediaError(f"cannot read the image: {str(error)[:100] or type(error).__name__}") from None
    if rgb is None:
        raise MediaError(f"the image has {pixels:,} pixels, the limit is {settings.image_pixels:,}: make it smaller")
    return rgb


def _check_sound(raw: bytes, settings: ServerSettings) -> None:
    """By its header: how much it would take once it is decoded."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            frames, channels, rate = file.frames, file.channels, file.samplerate
    except (soundfile.SoundFileError, RuntimeError):
        raise MediaError("cannot read the sound: send WAV, FLAC, OGG or MP3") from None
    if not _RATES[0] <= rate <= _RATES[1]:
        raise MediaError(f"the sound has {rate:,} samples a second: from {_RATES[0]:,} to {_RATES[1]:,} are read")
    if frames / rate > settings.audio_seconds:
        raise MediaError(f"the sound lasts {frames / rate:,.0f} s, the limit is {settings.audio_seconds:g} s")
    if frames * channels > settings.audio_samples:
        raise MediaError(
            f"the sound has {frames * channels:,} samples in {channels} channels, the limit is "
            f"{settings.audio_samples:,}: send it mono at 16 kHz"
        )
