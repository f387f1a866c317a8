"""`Dialect`: how one kind of server wants to be asked, and what it never tells."""

from __future__ import annotations

import json
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
        config: the same for settings that the field ``generation_config`` says, as JSON in the words of transformers.
        thinking: where ``enable_thinking`` stands: at the ``top``, in the ``template``'s arguments, or nowhere.
        stream_options: whether the tokens of a streamed answer have to be asked for.
        ours: the server is of this package: every switch works, and more comes with an answer.
        sound: the form of samples in a WAV file; ``FLOAT`` is exact, ``PCM_16`` is read everywhere.
        drops_media: images and sounds that its model does not read are left out without a word.
    """

    name: str
    fields: Mapping[str, str] = field(default_factory=lambda: _CORE)
    config: Mapping[str, str] = field(default_factory=dict)
    thinking: Literal["top", "template", "nowhere"] = "template"
    stream_options: bool = True
    ours: bool = False
    sound: Literal["FLOAT", "PCM_16"] = "PCM_16"
    drops_media: bool = False

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
        if self.config:
            extra["generation_config"] = json.dumps(self._config(settings))
        if "thinking" in settings and self.thinking != "nowhere":
            switch = {"enable_thinking": bool(settings["thinking"])}
            extra |= switch if self.thinking == "top" else {"chat_template_kwargs": switch}
        return said | ({"extra_body": extra} if extra else {})

    def refused(self, settings: Mapping[str, Any]) -> list[str]:
        """Settings that say something and that this server does not take."""
        plain = GenerationPolicy()
        names = [name for name, value in settings.items() if value is not None and value != getattr(plain, name)]
        known = {*self.fields, *self.config} | ({"thinking"} if self.thinking != "nowhere" else set())
        return [name for name in names if name not in known]

    def _config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        said = {at: settings[name] for name, at in self.config.items() if settings.get(name) is not None}
        # Without these a temperature is ignored, and only the 50 likeliest tokens are drawn from.
        return {"do_sample": bool(settings.get("temperature")), "top_k": 0} | said


_STANDARD = frozenset(_CORE.values())
OURS: Final = Dialect("autoglm_lab", _WIDE, thinking="top", ours=True, sound="FLOAT")
VLLM: Final = Dialect("vLLM", _WIDE)
SGLANG: Final = Dialect("SGLang", _WIDE)
LLAMA: Final = Dialect("llama.cpp", _CORE | {"repetition_penalty": "repeat_penalty", "eos": "ignore_eos"})
# Any field that it does not know is a 422. stream_options and presence_penalty it knows and ignores, and it reads
# frequency_penalty as a repetition penalty. What stands in generation_config is obeyed.
_LEAST: Final = {name: at for name, at in _CORE.items() if not name.endswith("_penalty")}
TRANSFORMERS: Final = Dialect(
    "transformers serve",
    _LEAST,
    {"min_new_tokens": "min_new_tokens", "repetition_penalty": "repetition_penalty"},
    stream_options=False,
    drops_media=True,
)
OTHER: Final = Dialect("this server", thinking="nowhere")
