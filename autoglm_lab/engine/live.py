"""Live sound: a stream encoded chunk by chunk while it comes in, before the question is asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from autoglm_lab.engine.messages import SAMPLING_RATE, AudioPart, Limits, Message, Part, TextPart, audio_part
from autoglm_lab.errors import MediaError


def with_sound(messages: tuple[Message, ...], sound: AudioPart, text: str | None) -> tuple[Message, ...]:
    """The question with its sound first and ``text`` after it, before what its message had already."""
    parts: tuple[Part, ...] = (sound,) if text is None else (sound, TextPart(text))
    if messages and messages[-1].role == "user":
        return (*messages[:-1], Message("user", (*parts, *messages[-1].parts)))
    return (*messages, Message("user", parts))


class LiveSound:
    """A sound under way. Only the engine's thread encodes; packets may be of any size.

    Args:
        model: a model with ``encode_audio_chunk(pcm, state, final=)``.
    """

    def __init__(self, model: Any, limits: Limits | None = None) -> None:
        self._model = model
        self._limit = round((limits or Limits()).audio_seconds * SAMPLING_RATE)
        self._packets: list[np.ndarray[Any, Any]] = []
        self._features: list[torch.Tensor] = []
        self._stream: Any = None
        self.samples = 0

    @property
    def tokens(self) -> int:
        """Audio tokens encoded so far."""
        return sum(features.shape[-2] for features in self._features)

    @torch.no_grad()
    def feed(self, pcm: Any) -> None:
        """Add samples ``[samples]``, float, 16 kHz mono, and encode the chunks that they complete.

        Raises:
            MediaError: not such samples, or the sound is over its limit.
        """
        packet = audio_part(pcm).samples
        if self.samples + packet.size > self._limit:
            raise MediaError(f"the live sound is over its limit of {self._limit / SAMPLING_RATE:.0f} s")
        self._encode(packet, final=False)
        self._packets.append(packet)
        self.samples += packet.size

    @torch.no_grad()
    def close(self) -> tuple[AudioPart, torch.Tensor]:
        """End the sound: it as a message part, and its features ``[tokens, hidden]``.

        Raises:
            MediaError: nothing was fed.
        """
        if not self.samples:
            raise MediaError("the live sound is empty: feed samples before asking")
        self._encode(np.zeros(0, dtype=np.float32), final=True)
        part = audio_part(np.concatenate(self._packets))
        return part, torch.cat([features.reshape(-1, features.shape[-1]) for features in self._features])

    def _encode(self, packet: Any, *, final: bool) -> None:
        features, self._stream = self._model.encode_audio_chunk(packet, self._stream, final=final)
        if features.numel():
            self._features.append(features)
