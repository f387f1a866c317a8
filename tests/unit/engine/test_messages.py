"""Messages in: what is read, and what is refused with which words."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoglm_lab.engine.messages import AudioPart, ImagePart, Limits, TextPart, read_messages
from autoglm_lab.errors import MediaError, MessageError


def png(width: int = 8, height: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def wav(seconds: float = 0.5, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        tone = np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
        file.writeframes((tone * 20000).astype("<i2").tobytes())
    return buffer.getvalue()


def user(*parts: dict[str, object]) -> list[dict[str, object]]:
    return [{"role": "user", "content": list(parts)}]


def test_plain_text_is_one_part() -> None:
    (message,) = read_messages([{"role": "user", "content": "hello"}])
    assert message.parts == (TextPart("hello"),)


def test_the_same_picture_has_the_same_digest_however_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "screen.png"
    path.write_bytes(png())
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    forms = [
        {"type": "image", "image": Image.new("RGB", (8, 6), "red")},
        {"type": "image", "image": str(path)},
        {"type": "image", "image": path},
        {"type": "image", "image": png()},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": uri},
    ]
    (message,) = read_messages(user(*forms))
    assert len({part.digest for part in message.parts if isinstance(part, ImagePart)}) == 1


def test_sounds_come_out_as_16_khz_mono() -> None:
    encoded = base64.b64encode(wav(0.5, 8000)).decode()
    stereo = np.zeros((8000, 2), dtype=np.float32)
    (message,) = read_messages(
        user(
            {"type": "audio", "audio": wav(0.5, 8000)},
            {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
            {"type": "audio", "audio": (stereo, 16000)},
            {"type": "audio", "audio": np.zeros(1600)},
        )
    )
    first, second, third, fourth = (part for part in message.parts if isinstance(part, AudioPart))
    assert abs(first.samples.size - 8000) < 16
    assert first.digest == second.digest
    spectrum = np.abs(np.fft.rfft(first.samples))
    assert abs(np.argmax(spectrum) * 16000 / first.samples.size - 440) < 4
    assert third.samples.shape == (8000,)
    assert fourth.samples.dtype == np.float32


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "messages are a list"),
        ([], "there are no messages"),
        ([{"role": "robot", "content": ""}], "unknown role 'robot': use system, user, assistant"),
        ([{"role": "user", "content": 3}], "the content of a message is text or a list of parts, not int"),
        (user(), "the user's message is empty: give text, an image or a sound"),
        ([{"role": "user", "content": ""}], "the user's message is empty"),
        (user({"type": "video"}), "unknown content part 'video': use text, image, audio, image_url, input_audio"),
        (user({"type": "image"}), "the content part of type 'image' is incomplete"),
    ],
)
def test_what_is_no_dialogue_is_refused(messages: object, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        read_messages(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image", "image": b"not a picture"}, "cannot read the image"),
        ({"type": "image", "image": "nowhere.png"}, "there is no image file 'nowhere.png'; URLs are not fetched"),
        ({"type": "image_url", "image_url": {"url": "http://x/y.png"}}, "must be a data URI"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}, "not valid base64"),
        ({"type": "image", "image": png(200, 200)}, "the image has 40,000 pixels, the limit is 10,000"),
        ({"type": "audio", "audio": b"RIFFnonsense"}, "cannot read the sound"),
        ({"type": "audio", "audio": np.zeros(0)}, r"mono samples of shape \[samples\]"),
        ({"type": "audio", "audio": np.full(100, np.nan)}, "not finite"),
        ({"type": "audio", "audio": wav(3.0)}, "the sound lasts 3 s, the limit is 2 s"),
    ],
)
def test_media_that_cannot_be_read_say_why(part: dict[str, object], words: str) -> None:
    with pytest.raises(MediaError, match=words):
        read_messages(user(part), Limits(image_pixels=10_000, audio_seconds=2.0))


def test_an_oversized_upload_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(MediaError, match="the limit is 1,000"):
        read_messages(user({"type": "image", "image": b"x" * 1001}), Limits(media_bytes=1000))
    body = base64.b64encode(b"x" * 2000).decode()
    with pytest.raises(MediaError, match="the limit is 1,000"):
        read_messages(user({"type": "input_audio", "input_audio": {"data": body}}), Limits(media_bytes=1000))
