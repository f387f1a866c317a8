"""What clients send: messages with pictures and sounds as OpenAI's API has them."""

from __future__ import annotations

import base64
from typing import Any

from autoglm_lab import samples


def user(text: str, *media: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*media, {"type": "text", "text": text}] if media else text}


def image_url(data: bytes, kind: str = "png") -> dict[str, Any]:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def sample(name: str) -> samples.Sample:
    return next(one for one in samples.SAMPLES if one.name == name)


def screen(name: str = "home") -> dict[str, Any]:
    path = sample(name).image
    assert path is not None
    return image_url(path.read_bytes())


def sound(name: str = "number") -> dict[str, Any]:
    path = sample(name).audio
    assert path is not None
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
