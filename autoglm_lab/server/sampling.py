"""What a request says about the answer: each setting is obeyed, or refused by name, or told to be ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from autoglm_lab.server.request_error import RequestError

# What this service has not, with the values that ask for nothing. None asks for nothing anywhere.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "num_beams": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "text": ({}, {"format": {"type": "text"}}),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "top_k": (0, -1),
    "min_p": (0,),
    "top_a": (0,),
    "typical_p": (1,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "web_search_options": (),
    "background": (False,),
    "conversation_id": (),
}
_THINKS: dict[str, bool] = {"none": False, "minimal": False, "low": True, "medium": True, "high": True, "xhigh": True}
_SHOWN = 20

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Sampling(BaseModel):
    """The settings that OpenAI's endpoints, vLLM's and ours have for an answer. What is None is as the policy says."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = Field(None, max_length=512)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=1 << 31)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 31)
    max_output_tokens: int | None = Field(None, ge=1, le=1 << 31)
    max_new_tokens: int | None = Field(None, ge=1, le=1 << 31)
    min_tokens: int | None = Field(None, ge=0, le=1 << 31)
    min_new_tokens: int | None = Field(None, ge=0, le=1 << 31)
    ignore_eos: bool | None = None
    eos: bool | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    enable_thinking: bool | None = None
    thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(None, max_length=20)
    return_reasoning: bool = True
    conversation: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")] | None = None
    replace: bool = True
    force: bool = False

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        self._one("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens")
        self._one("min_tokens", "min_new_tokens")
        return self

    def generation(self, *, can_think: bool) -> dict[str, Any]:
        """The settings as ``policy.generation`` names them; those that are None are left out.

        Raises:
            RequestError: 400, something was asked for that this service has not.
        """
        self._refuse()
        eos = self.eos if self.ignore_eos is None else not self.ignore_eos
        given = {
            "max_new_tokens": self._one("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens"),
            "min_new_tokens": self._one("min_tokens", "min_new_tokens"),
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "eos": eos,
            "thinking": self._thinks() if can_think else None,
        }
        for name in ("temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty"):
            given[name] = getattr(self, name)
        return {name: value for name, value in given.items() if value is not None}

    def ignored(self, *, can_think: bool) -> str:
        """The names of fields that have no effect, for a header; empty where there is none."""
        names = [name for name in self.model_extra or {} if name not in _REFUSED]
        names += ["enable_thinking"] * bool(self._thinks() and not can_think)
        names += [f"chat_template_kwargs.{name}" for name in self.chat_template_kwargs or {} if name != _TEMPLATE]
        readable = [name if name.isascii() and name.isprintable() else "?" for name in names]
        return ", ".join(name[:60] for name in readable[:_SHOWN])

    def _thinks(self) -> bool | None:
        template = (self.chat_template_kwargs or {}).get(_TEMPLATE)
        for one in (self.enable_thinking, self.thinking, template if isinstance(template, bool) else None):
            if one is not None:
                return one
        if self.reasoning_effort is None:
            return None
        if self.reasoning_effort not in _THINKS:
            message = f"unknown reasoning_effort {self.reasoning_effort!r}: use {', '.join(_THINKS)}"
            raise RequestError(400, message, "invalid_value", param="reasoning_effort")
        return _THINKS[self.reasoning_effort]

    def _one(self, *names: str) -> Any:
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(set(given.values())) > 1:
            raise ValueError(f"{' and '.join(given)} mean the same, and differ: send one of them")
        return next(iter(given.values()), None)

    def _refuse(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if name in _REFUSED and value is not None and value not in _REFUSED[name]:
                neutral = " or ".join(repr(one) for one in _REFUSED[name])
                advice = f"leave it out{', or send ' + neutral if neutral else ''}"
                raise RequestError(400, f"this service has no '{name}': {advice}", "unsupported_parameter", param=name)


_TEMPLATE: Literal["enable_thinking"] = "enable_thinking"
