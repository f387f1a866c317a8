"""How a service is offered: where, to whom, and how large a request may be. What the model does is the policy's."""

from __future__ import annotations

import importlib.util
import ipaddress
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autoglm_lab.engine.messages import Limits
from autoglm_lab.errors import LabError

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "websockets")


class ServerSettings(BaseModel):
    """Settings of one service.

    Attributes:
        host: address to listen at. Beyond this machine only with an ``api_key``. Default ``127.0.0.1``.
        port: 0 picks a free one. Default 8000.
        api_key: what clients send as ``Authorization: Bearer …``; None: nothing is asked, on this machine alone.
        admin_key: what changes of memory and policy ask for; None: nobody may where there is an ``api_key``, and
            everybody on this machine where there is none.
        names: further names that the model answers to.
        media_domains: hosts whose ``https`` images and sounds are fetched; none by default.
        origins: web pages that may call, such as ``https://lab.example.org``; none but the service's own by default.
        running: most answers under way at the same time.
        waiting: most requests that wait for one of those places; beyond that a client gets 429.
        body_bytes: of one request.
        prompt_chars: of all the text of one request.
        media: images and sounds of one request.
        image_pixels: of one image. audio_seconds: of one sound. media_bytes: of one, before it is decoded.
        audio_samples: of one sound, all channels together, before it is brought to 16 kHz mono.
        stored_bytes: of dialogues kept for ``previous_response_id``.
        drain_seconds: how long answers under way may go on after the service was told to stop.
        log_prompts: also log what was asked. Default False.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_key: str | None = Field(None, min_length=1)
    admin_key: str | None = Field(None, min_length=1)
    names: tuple[str, ...] = ("autoglm-phone-9b",)
    media_domains: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    running: int = Field(32, ge=1)
    waiting: int = Field(128, ge=0)
    body_bytes: int = Field(32_000_000, ge=1)
    prompt_chars: int = Field(400_000, ge=1)
    media: int = Field(64, ge=0)
    image_pixels: int = Field(40_000_000, ge=1)
    audio_seconds: float = Field(600.0, gt=0)
    audio_samples: int = Field(60_000_000, ge=1)
    media_bytes: int = Field(20_000_000, ge=1)
    stored_bytes: int = Field(64_000_000, ge=0)
    drain_seconds: float = Field(30.0, ge=0)
    log_prompts: bool = False

    def __init__(self, **settings: Any) -> None:
        """Validate ``settings``.

        Raises:
            LabError: a setting does not exist or cannot be.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            problem = error.errors(include_input=False)[0]
            where = ".".join(str(step) for step in problem["loc"])
            message = str(problem["msg"]).removeprefix("Value error, ")
            known = f"; settings are {', '.join(type(self).model_fields)}" * (problem["type"] == "extra_forbidden")
            raise LabError(f"serve: {where + ': ' if where else ''}{message}{known}") from None

    @model_validator(mode="after")
    def _keys_beyond_this_machine(self) -> ServerSettings:
        if not self.loopback and self.api_key is None:
            raise ValueError(
                f"a service at {self.host} can be reached from other machines: give it a key (--api-key, or "
                "AUTOGLM_LAB_API_KEY), or leave it at 127.0.0.1"
            )
        if self.admin_key is not None and self.admin_key == self.api_key:
            raise ValueError("the admin key must not be the clients' key: clients could change the memory with it")
        for key in (self.api_key, self.admin_key):
            if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
                raise ValueError("a key is printable ASCII without spaces: it travels in a header")
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return is_loopback(self.host)

    @property
    def limits(self) -> Limits:
        """What one image or sound may be."""
        return Limits(self.image_pixels, self.audio_seconds, self.media_bytes)


def check_settings(**settings: Any) -> ServerSettings:
    """The settings of a service, before anything is loaded.

    Raises:
        LabError: one cannot be, or the extra ``serve`` is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        raise LabError('serving needs the extra "serve": pip install "autoglm-lab[serve]"')
    return ServerSettings(**settings)


def is_loopback(host: str) -> bool:
    """Whether a name or address stands for this machine and cannot be reached from another."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
