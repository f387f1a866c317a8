"""`EndpointChat`: langchain's ChatOpenAI that keeps what servers of open models say beyond OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from autoglm_lab.engine.remote.link import CONNECT_SECONDS, Link
from autoglm_lab.engine.wire import EXTENSION

REASONING = "reasoning_content"
"""The key of a thought in ``additional_kwargs``."""


class EndpointChat(ChatOpenAI):
    """ChatOpenAI with the thought in ``additional_kwargs["reasoning_content"]``, streamed or not.

    vLLM calls it ``reasoning``, SGLang and transformers ``reasoning_content``; both are read. What a server of ours
    adds stands in ``additional_kwargs["autoglm_lab"]``, a list. The most tokens go out as ``max_tokens``, which every
    server knows.
    """

    def _get_request_payload(self, input_: Any, *, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        payload = super()._get_request_payload(input_, stop=stop, **kwargs)
        if "max_completion_tokens" in payload:
            payload["max_tokens"] = payload.pop("max_completion_tokens")
        return payload

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        whole = response if isinstance(response, Mapping) else response.model_dump()
        for choice, generation in zip(whole.get("choices") or (), result.generations, strict=False):
            _keep(generation.message, choice.get("message"), whole)
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        generation = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if generation is not None:
            choices: list[Any] = chunk.get("choices") or [{}]
            _keep(generation.message, choices[0].get("delta"), chunk)
        return generation


def endpoint_chat(
    link: Link, model: str, *, timeout: float, retries: int, counted: bool
) -> tuple[EndpointChat, httpx.AsyncClient]:
    """Who asks an endpoint, and the client that has to be closed in the loop that it was used in.

    Args:
        timeout: seconds without a word after which an answer counts as broken off.
        counted: whether the tokens of a streamed answer have to be asked for.
    """
    waits = httpx.Timeout(timeout, connect=CONNECT_SECONDS)
    client = httpx.AsyncClient(timeout=waits, trust_env=link.trust_env)
    chat = EndpointChat(
        model=model,
        base_url=link.url,
        api_key=SecretStr(link.api_key),
        max_retries=retries,
        timeout=waits,
        stream_chunk_timeout=timeout,
        stream_usage=counted,
        http_async_client=client,
        http_client=link.client,
    )
    return chat, client


def _keep(message: Any, said: Any, whole: Mapping[str, Any]) -> None:
    if not isinstance(message, AIMessage):
        return
    thought = next((said[key] for key in (REASONING, "reasoning") if said.get(key)), None) if said else None
    if isinstance(thought, str):
        message.additional_kwargs[REASONING] = thought
    if isinstance(whole.get(EXTENSION), Mapping):
        message.additional_kwargs[EXTENSION] = [whole[EXTENSION]]
