"""`History`: what was said in one conversation with an endpoint, which keeps nothing and is told all of it again."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from autoglm_lab.engine.messages import SAMPLING_RATE, AudioPart, ImagePart, Message, Part, TextPart
from autoglm_lab.engine.protocol import ConversationInfo

WireMessage = dict[str, Any]


@dataclass
class History:
    """One conversation, changed by the engine's loop alone.

    Attributes:
        messages: as they go over the wire, oldest first.
        turns: answers that it has.
        tokens: of the last prompt and its answer.
        busy: a turn is under way.
    """

    messages: list[WireMessage] = field(default_factory=list)
    turns: int = 0
    tokens: int = 0
    cached: int = 0
    prompt: int = 0
    busy: int = 0

    def asking(self, new: Sequence[WireMessage], *, media: Literal["resend", "strip"]) -> list[WireMessage]:
        """Everything to send for a turn that adds ``new``."""
        old = self.messages if media == "resend" else [without_media(message) for message in self.messages]
        return [*old, *new]

    def info(self, name: str) -> ConversationInfo:
        share = self.cached / self.prompt if self.prompt else None
        return ConversationInfo(name, self.turns, self.tokens, None, bool(self.busy), share)


def wire_message(message: Message, sound: str) -> WireMessage:
    """A message as OpenAI's API takes it; images as PNG, sounds as WAV with samples as ``sound``."""
    if all(isinstance(part, TextPart) for part in message.parts):
        return {"role": message.role, "content": message.text}
    return {"role": message.role, "content": [_wire_part(part, sound) for part in message.parts]}


def without_media(message: WireMessage) -> WireMessage:
    """The message with words in place of its images and sounds."""
    content = message["content"]
    if isinstance(content, str):
        return message
    text = [part["text"] for part in content if part["type"] == "text"]
    return {"role": message["role"], "content": "\n".join(text) or "(media)"}


def _wire_part(part: Part, sound: str) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ImagePart):
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(part)}"}}
    return {"type": "input_audio", "input_audio": {"data": _wav(part, sound), "format": "wav"}}


def _png(part: ImagePart) -> str:
    buffer = io.BytesIO()
    part.image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _wav(part: AudioPart, sound: str) -> str:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, part.samples, SAMPLING_RATE, format="WAV", subtype=sound)
    return base64.b64encode(buffer.getvalue()).decode()
