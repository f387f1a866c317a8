"""Clients that know nothing of this service: the article's snippet, the phone agent's, and OpenAI's newer endpoint."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest
from langchain_openai import ChatOpenAI
from openai import OpenAI

import autoglm_lab as lab
from autoglm_lab.server.run import Serving
from tests.unit.server.payloads import sample, screen, user


def test_the_articles_snippet_works_unchanged(wb: lab.Workbench, served: Serving) -> None:
    model = ChatOpenAI(
        model="autoglm-phone-9b",
        temperature=0.5,
        base_url=served.url,
        api_key="EMPTY",
        extra_body={"enable_thinking": True, "return_reasoning": True},
        streaming=True,
    )
    answer = model.invoke("你是谁?")
    assert "AutoGLM" in str(answer.content)
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] > 10


def test_a_plain_client_sees_reused_tokens_and_warnings(wb: lab.Workbench, served: Serving) -> None:
    model = ChatOpenAI(
        model="autoglm-tiny", base_url=served.url, api_key="EMPTY", include_response_headers=True, max_tokens=8
    )
    prompt = [("system", "You hold a phone. " * 20), ("user", "Who are you?")]
    model.invoke(prompt)
    answer = model.invoke(prompt, user="me")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_token_details"]["cache_read"] >= 64
    assert answer.response_metadata["headers"]["x-autoglm-ignored"] == "user"


def test_reasoning_reaches_a_plain_client_through_responses(wb: lab.Workbench, served: Serving) -> None:
    model = ChatOpenAI(
        model="autoglm-tiny",
        base_url=served.url,
        api_key="EMPTY",
        use_responses_api=True,
        reasoning={"effort": "high", "summary": "auto"},
        streaming=True,
    )
    answer = model.invoke("Who are you?")
    blocks: list[Any] = list(answer.content)
    thought = "".join(part["text"] for block in blocks if block["type"] == "reasoning" for part in block["summary"])
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    expected = wb.chat("Who are you?", thinking=True).result(60)
    assert (thought, text) == (expected.reasoning, expected.text)


def test_the_phone_agents_conversation(wb: lab.Workbench, served: Serving) -> None:
    """Streaming, the image before the text, the images of earlier steps stripped, its sampling settings."""
    agent = OpenAI(base_url=served.url, api_key="EMPTY")
    context: list[Any] = [{"role": "system", "content": "You are a phone agent. " * 10}]
    texts = [sample("home").prompt["en"], "Tap the blue square", sample("home").prompt["en"]]
    answers, cached = [], []
    for text in texts:
        context.append(user(text, screen()))
        stream = agent.chat.completions.create(
            messages=context,
            model="autoglm-phone-9b",
            max_tokens=3000,
            temperature=0.0,
            top_p=0.85,
            frequency_penalty=0.2,
            stream=True,
        )
        raw = ""
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content is not None:
                raw += chunk.choices[0].delta.content
            if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
                cached.append(chunk.usage.prompt_tokens_details.cached_tokens)
        answers.append(raw)
        context[-1]["content"] = [part for part in context[-1]["content"] if part["type"] == "text"]
        context.append({"role": "assistant", "content": f"<think></think><answer>{raw}</answer>"})
    assert all(answer.startswith(("do(action=", "finish(")) for answer in answers)
    assert cached[0] == 0 and min(cached[1:]) >= 64
    assert wb.conversations == ()


def test_openais_own_client_gets_typed_errors(wb: lab.Workbench, served: Serving) -> None:
    from openai import BadRequestError, NotFoundError

    agent = OpenAI(base_url=served.url, api_key="EMPTY", max_retries=0)
    with pytest.raises(BadRequestError, match="no 'n'"):
        agent.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], model="autoglm-tiny", n=2)
    with pytest.raises(NotFoundError, match="there is no model"):
        agent.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], model="other")


def test_a_response_goes_on_from_the_one_before(client: httpx.Client) -> None:
    first = client.post("/responses", json={"input": "Who are you?", "max_output_tokens": 40}).json()
    body = {"input": "Again", "previous_response_id": first["id"], "max_output_tokens": 8, "instructions": "Be brief"}
    second = client.post("/responses", json=body).json()
    said = first["output"][0]["content"][0]["text"]
    dialogue = [
        {"role": "system", "content": "Be brief"},
        user("Who are you?"),
        {"role": "assistant", "content": said},
        user("Again"),
    ]
    chat = client.post("/chat/completions", json={"messages": dialogue, "max_tokens": 8}).json()
    assert second["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert second["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert (second["status"], second["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert client.get(f"/responses/{first['id']}").json() == first
    assert client.delete(f"/responses/{first['id']}").json()["deleted"]
    gone = client.post("/responses", json={"input": "x", "previous_response_id": first["id"]})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")


def test_a_response_that_is_not_to_be_stored_is_not(client: httpx.Client) -> None:
    response = client.post("/responses", json={"input": "Hi", "store": False, "max_output_tokens": 2}).json()
    assert client.get(f"/responses/{response['id']}").status_code == 404


def test_a_response_sees_pictures(client: httpx.Client) -> None:
    home = sample("home")
    assert home.image is not None
    url = "data:image/png;base64," + base64.b64encode(home.image.read_bytes()).decode()
    parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": home.prompt["en"]}]
    answer = client.post("/responses", json={"input": [{"role": "user", "content": parts}]}).json()
    assert answer["output"][0]["content"][0]["text"] == home.answer


def test_an_input_item_that_is_unknown_is_refused(client: httpx.Client) -> None:
    response = client.post("/responses", json={"input": [{"type": "function_call_output", "output": "x"}]})
    assert response.status_code == 400 and "function_call_output" in response.json()["error"]["message"]
