"""What a stranger may try: other people's files and machines, bombs, guessed keys, bodies without end."""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import struct
import wave
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from autoglm_lab.errors import MediaError
from autoglm_lab.server import fetch as fetching
from autoglm_lab.server.fetch import fetch, is_public, public_address
from autoglm_lab.server.media import read_dialogue
from autoglm_lab.server.settings import ServerSettings
from tests.unit.server.payloads import image_url, user

PATH = "/chat/completions"
SAY = {"messages": [user("Hi")], "max_tokens": 1}


def refused(client: httpx.Client, *parts: dict[str, Any]) -> str:
    response = client.post(PATH, json={"messages": [user("What is it?", *parts)], "max_tokens": 1})
    assert response.status_code == 400, response.text
    message: str = response.json()["error"]["message"]
    return message


# files and addresses


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_files_of_this_machine_cannot_be_named(client: httpx.Client, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "secret.png"
    file.write_bytes(b"secret")
    message = refused(client, {"type": kind, kind: str(file)})
    assert message == f"unknown content part '{kind}': use text, image_url, input_audio"


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        "https://127.0.0.1/x.png",
        "HTTPS://[::1]/x.png",
        "https://example.org@127.0.0.1/x.png",
        "ftp://example.org/x.png",
        "https://[::1",
    ],
)
def test_nothing_is_fetched_unless_it_is_allowed(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr(fetching, "public_address", lambda host: pytest.fail(f"asked for {host}"))
    message = refused(client, {"type": "image_url", "image_url": {"url": url}})
    assert "data URI" in message or "cannot be read" in message
    assert "passwd" not in message


@pytest.mark.parametrize("url", ["http://img.test/a", "https://img.test:8443/a", "https://me:pw@img.test/a"])
def test_an_allowed_host_is_reached_by_plain_https_alone(url: str) -> None:
    with pytest.raises(MediaError, match="https at its usual port alone"):
        fetch(url, ["img.test"], 100, "image", connect=lambda *_: pytest.fail("connected"))


@pytest.mark.parametrize(
    "url", ["https://img.test.evil.test/a", "https://sub.img.test/a", "https://evil.test/img.test"]
)
def test_only_the_very_host_is_allowed(url: str) -> None:
    with pytest.raises(MediaError, match="fetches only from img"):
        fetch(url, ["img.test"], 100, "image", connect=lambda *_: pytest.fail("connected"))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::",
    ],
)  # fmt: skip
def test_addresses_inside_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_outside_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def named(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Let every name lead to these addresses. Returns the names that were looked up."""
    asked: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(fetching.socket, "getaddrinfo", look_up)
    return asked


def test_a_name_that_leads_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "93.184.216.34", "10.0.0.5")
    with pytest.raises(MediaError, match="inside of this network"):
        public_address("img.test")
    with pytest.raises(MediaError, match="inside of this network"):
        fetch("https://img.test/a", ["img.test"], 100, "image", connect=lambda *_: pytest.fail("connected"))


class Answering:
    """A connection that answers with one response."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self.asked = raw, ("", {})
        self.closed = False

    def request(self, method: str, target: str, headers: dict[str, str]) -> None:
        self.asked = (f"{method} {target}", headers)  # type: ignore[assignment]

    def getresponse(self) -> http.client.HTTPResponse:
        raw = self._raw

        class Socket:
            def makefile(self, *_: Any) -> io.BytesIO:
                return io.BytesIO(raw)

        response = http.client.HTTPResponse(Socket())  # type: ignore[arg-type]
        response.begin()
        return response

    def close(self) -> None:
        self.closed = True


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = named(monkeypatch, "93.184.216.34")
    connection = Answering(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
    reached: list[str] = []

    def connect(address: Any, host: str, _: float) -> Answering:
        reached.append(f"{address} as {host}")
        return connection

    assert fetch("https://img.test/a?b=c", ["img.test"], 100, "image", connect=connect) == b"abc"
    assert (asked, reached) == (["img.test"], ["93.184.216.34 as img.test"])
    assert connection.asked[0] == "GET /a?b=c" and connection.closed


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "redirects"),
        (b"HTTP/1.1 404 Gone\r\nContent-Length: 0\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", "compressed"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 101, "more than 100 bytes"),
        (b"garbage", "did not send it"),
    ],
)
def test_what_a_host_sends_is_not_trusted(monkeypatch: pytest.MonkeyPatch, raw: bytes, message: str) -> None:
    named(monkeypatch, "93.184.216.34")
    with pytest.raises(MediaError, match=message):
        fetch("https://img.test/a", ["img.test"], 100, "image", connect=lambda *_: Answering(raw))


# bombs


def bomb_png(width: int, height: int) -> bytes:
    """A small PNG that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 30_000), (65_000, 1_000), (2_000_000_000, 2_000_000_000)])
def test_a_picture_that_would_unfold_is_refused_by_its_header(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert "image" in refused(client, image_url(bomb_png(*size)))


@pytest.mark.parametrize(
    "raw", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"\x89PNG\r\n\x1a\n", bomb_png(100, 100)]
)
def test_what_is_no_picture_is_refused(client: httpx.Client, raw: bytes) -> None:
    assert refused(client, image_url(raw)).startswith("cannot read the image")


def wav(frames: int, rate: int, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(bytes(2 * channels * frames))
    return file.getvalue()


def flac(frames: int, channels: int, rate: int) -> bytes:
    """Silence, which FLAC folds to almost nothing."""
    import numpy as np
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros((frames, channels), np.int16), rate, format="FLAC")
    return file.getvalue()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (wav(20_000, 4_000), "lasts 5 s, the limit is 2 s"),
        (flac(90_000, 8, 96_000), "720,000 samples in 8 channels, the limit is 500,000"),
        (wav(100, 1), "1 samples a second"),
        (wav(100, 2_000_000_000), "2,000,000,000 samples a second"),
        (b"RIFF\xff\xff\xff\xffWAVEfmt ", "cannot read the sound"),
    ],
)
def test_a_sound_that_would_unfold_is_refused_by_its_header(raw: bytes, message: str) -> None:
    import base64

    settings = ServerSettings(audio_seconds=2, audio_samples=500_000)
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(raw).decode(), "format": "wav"}}
    with pytest.raises(MediaError, match=message):
        read_dialogue([user("?", part)], settings)


def test_text_and_media_of_a_request_are_limited(another: Callable[..., httpx.Client]) -> None:
    client = another(prompt_chars=100, media=1, media_bytes=100, image_pixels=50)
    assert refused(client, {"type": "text", "text": "x" * 200}).startswith("the text has 211 characters")
    pixel = {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}
    assert "2 images and sounds, the limit is 1" in refused(client, pixel, pixel)
    assert "the limit is 100" in refused(client, image_url(bytes(200)))
    assert "the limit is 50" in refused(client, image_url(bomb_png(10, 10)[:80]))


# bodies


def test_a_body_that_says_it_is_too_large_is_not_read(another: Callable[..., httpx.Client]) -> None:
    response = another(body_bytes=1000).post(PATH, content=b"x" * 2000)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "the body is over the limit of 1,000 bytes"


def test_a_body_without_a_length_is_cut_while_it_comes(another: Callable[..., httpx.Client]) -> None:
    client = another(body_bytes=1000)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100_000):
            sent += 1000
            yield b" " * 1000

    try:
        status = client.post(PATH, content=endless(), headers={"content-type": "application/json"}).status_code
    except httpx.TransportError:  # closed while we were sending
        status = 413
    assert status == 413 and sent < 50_000_000
    assert client.post(PATH, json=SAY).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b'{"messages": NaN}', b"\xff\xfe", b"null"])
def test_a_body_that_is_no_request_is_refused(client: httpx.Client, body: bytes) -> None:
    response = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and set(response.json()["error"]) == {"message", "type", "param", "code"}


# names


@pytest.mark.parametrize("name", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "a\x00b", "x" * 400])
def test_a_models_name_is_a_name_and_no_path(client: httpx.Client, name: str) -> None:
    response = client.post(PATH, json={"model": name, **SAY})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert client.get(f"/models/{name.replace(chr(0), '%00')}").status_code == 404


def test_an_error_of_the_inside_stays_inside(client: httpx.Client, monkeypatch: pytest.MonkeyPatch, wb: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("/secret/path and a stack")

    monkeypatch.setattr(wb.engine, "submit", broken)
    response = client.post(PATH, json=SAY)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the service failed on this request; its log says why"
