"""`Dialect`: how one kind of server wants to be asked, and what it never tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from autoglm_lab.policy import GenerationPolicy

_CORE: Final = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "stop": "stop",
    "seed": "seed",
}
_WIDE: Final = _CORE | {
    "min_new_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
    "eos": "ignore_eos",
}


@dataclass(frozen=True)
class Dialect:
    """One kind of server.

    Attributes:
        name: for people.
        fields: settings of ``policy.generation`` and the field of a request that says each; what is missing is refused
            there and never sent.
        thinking: where ``enable_thinking`` stands: at the ``top``, in the ``template``'s arguments, or nowhere.
        stream_options: whether the tokens of a streamed answer have to be asked for.
        ours: the server is of this package: every switch works, and more comes with an answer.
        sound: the form of samples in a WAV file; ``FLOAT`` is exact, ``PCM_16`` is read everywhere.
    """

    name: str
    fields: Mapping[str, str] = field(default_factory=lambda: _CORE)
    thinking: Literal["top", "template", "nowhere"] = "template"
    stream_options: bool = True
    ours: bool = False
    sound: Literal["FLOAT", "PCM_16"] = "PCM_16"

    def request(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a request that say ``settings`` of `GenerationPolicy`.

        OpenAI's own are at the top, what the client library does not know under ``extra_body``.
        """
        said: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for name, value in settings.items():
            at = self.fields.get(name)
            if at is None or value is None:
                continue
            if name == "eos":
                extra |= {} if value else {at: True}
            elif name == "stop":
                said |= {at: list(value)} if value else {}
            elif at in _STANDARD:
                said[at] = value
            else:
                extra[at] = value
        if "thinking" in settings and self.thinking != "nowhere":
            switch = {"enable_thinking": bool(settings["thinking"])}
            extra |= switch if self.thinking == "top" else {"chat_template_kwargs": switch}
        return said | ({"extra_body": extra} if extra else {})

    def refused(self, settings: Mapping[str, Any]) -> list[str]:
        """Settings that say something and that this server does not take."""
        plain = GenerationPolicy()
        names = [name for name, value in settings.items() if value is not None and value != getattr(plain, name)]
        known = {*self.fields} | ({"thinking"} if self.thinking != "nowhere" else set())
        return [name for name in names if name not in known]


_STANDARD = frozenset(_CORE.values())
OURS: Final = Dialect("autoglm_lab", _WIDE, "top", ours=True, sound="FLOAT")
VLLM: Final = Dialect("vLLM", _WIDE)
SGLANG: Final = Dialect("SGLang", _WIDE)
LLAMA: Final = Dialect("llama.cpp", _CORE | {"repetition_penalty": "repeat_penalty", "eos": "ignore_eos"})
# Any field that it does not know is a 422; stream_options it knows and ignores.
_LEAST: Final = {name: at for name, at in _CORE.items() if name != "presence_penalty"}
TRANSFORMERS: Final = Dialect("transformers serve", _LEAST, stream_options=False)
OTHER: Final = Dialect("this server", thinking="nowhere")
