"""`/v1/chat/completions`: the engine's own answers, streamed or whole, and every setting obeyed or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import autoglm_lab as lab
from autoglm_lab.engine.protocol import Answer
from autoglm_lab.engine.wire import EXTENSION, from_wire
from tests.unit.server.payloads import sample, screen, sound, user

PATH = "/chat/completions"


def chunks(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The parsed chunks of a stream, which ends as OpenAI's do."""
    with client.stream("POST", PATH, json={"stream": True, **body}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(found: list[dict[str, Any]], field: str = "content") -> str:
    return "".join(choice["delta"].get(field) or "" for chunk in found for choice in chunk["choices"])


@pytest.mark.parametrize("name", ["home", "number", "key"])
def test_pictures_and_sounds_get_the_engines_answer(client: httpx.Client, wb: lab.Workbench, name: str) -> None:
    asked = sample(name)
    media = [screen(name)] if asked.image else []
    media += [sound(name)] if asked.audio else []
    answer = client.post(PATH, json={"messages": [user(asked.prompt["en"], *media)]}).json()
    expected = wb.chat(asked.prompt["en"], image=asked.image, audio=asked.audio).result(60)
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 49 * (asked.image is not None)


def test_a_stream_says_what_the_whole_answer_says(client: httpx.Client, wb: lab.Workbench) -> None:
    body = {"messages": [user("你是谁?")], "model": "autoglm-tiny"}
    whole = client.post(PATH, json=body).json()
    assert whole["choices"][0]["message"]["content"] == wb.chat("你是谁?").result(60).text
    found = chunks(client, body)
    assert joined(found) == whole["choices"][0]["message"]["content"]
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert found[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "stop"
    assert {chunk["id"] for chunk in found} == {found[0]["id"]}


def test_the_last_chunk_tells_what_the_answer_took(client: httpx.Client) -> None:
    last = chunks(client, {"messages": [user("Who are you?")], "max_tokens": 8})[-1]
    answer = from_wire(Answer, last[EXTENSION]["answer"])
    usage = last["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (8, answer.usage.prompt_tokens + 8)
    assert usage["kv_bytes"] == answer.kv_bytes and usage["kv_bytes"] > 0
    assert usage["peak_bytes"] == max(answer.peak_bytes.values())
    assert usage["first_token_s"] == answer.timings.first_token


def test_usage_comes_in_a_chunk_of_its_own_where_that_is_asked(client: httpx.Client) -> None:
    body = {"messages": [user("Who are you?")], "max_tokens": 4, "stream_options": {"include_usage": True}}
    found = chunks(client, body)
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 4
    assert all("usage" not in chunk for chunk in found[:-1])


def test_the_thought_comes_beside_the_answer_under_both_names(client: httpx.Client) -> None:
    body = {"messages": [user("Who are you?")], "enable_thinking": True}
    message = client.post(PATH, json=body).json()["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] != ""
    found = chunks(client, body)
    assert joined(found, "reasoning_content") == joined(found, "reasoning") == message["reasoning"]
    assert joined(found) == message["content"]


@pytest.mark.parametrize("way", [{"reasoning_effort": "high"}, {"chat_template_kwargs": {"enable_thinking": True}}])
def test_other_ways_to_ask_for_a_thought(client: httpx.Client, way: dict[str, Any]) -> None:
    message = client.post(PATH, json={"messages": [user("Who are you?")], **way}).json()["choices"][0]["message"]
    assert message["reasoning"]


def test_a_thought_that_is_not_wanted_is_not_sent(client: httpx.Client) -> None:
    body = {"messages": [user("Who are you?")], "enable_thinking": True, "return_reasoning": False}
    answer = client.post(PATH, json=body).json()
    assert set(answer["choices"][0]["message"]) == {"role", "content"}
    assert answer[EXTENSION]["answer"]["reasoning"] == ""


def test_a_client_without_state_reuses_what_its_dialogue_begins_with(client: httpx.Client, wb: lab.Workbench) -> None:
    dialogue: list[dict[str, Any]] = [{"role": "system", "content": "You hold a phone. " * 20}]
    shares = []
    for text in ("Who are you?", "What can you do?", "Thanks"):
        dialogue.append(user(text))
        answer = client.post(PATH, json={"messages": dialogue, "max_tokens": 16}).json()
        dialogue.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        usage = answer["usage"]
        shares.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
    assert shares[0] == 0 and min(shares[1:]) > 0.7
    assert wb.conversations == ()


def test_a_named_conversation_is_kept(client: httpx.Client, wb: lab.Workbench) -> None:
    body = {"conversation": "phone", "max_tokens": 16}
    client.post(PATH, json={"messages": [user("Who are you?")], **body})
    client.post(PATH, json={"messages": [user("And then?")], "replace": False, **body})
    (info,) = wb.conversations
    assert (info.name, info.turns) == ("phone", 2)


def test_settings_are_obeyed(client: httpx.Client) -> None:
    def answer(**settings: Any) -> dict[str, Any]:
        found = client.post(PATH, json={"messages": [user("Who are you?")], **settings})
        assert found.status_code == 200, found.text
        choice: dict[str, Any] = found.json()["choices"][0]
        return choice

    plain = answer()["message"]["content"]
    assert answer(max_completion_tokens=3)["finish_reason"] == "length"
    assert answer(stop=plain[5:8])["message"]["content"] == plain[: plain.index(plain[5:8])]
    long: dict[str, Any] = {"max_tokens": 50, "ignore_eos": True}
    sampled = {"temperature": 2.0, **long}
    assert answer(**sampled, seed=3) == answer(**sampled, seed=3) != answer(**sampled, seed=4)
    assert answer(**long, frequency_penalty=2.0) != answer(**long)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("logit_bias", {"5": 1}),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("top_k", 40),
        ("min_p", 0.1),
        ("temperature", 2.5),
        ("top_p", 0),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("max_tokens", 0),
        ("frequency_penalty", 3),
        ("repetition_penalty", 0),
        ("seed", 1 << 70),
        ("reasoning_effort", "extreme"),
        ("conversation", ""),
    ],
)
def test_what_cannot_be_is_refused_by_name(client: httpx.Client, field: str, value: Any) -> None:
    response = client.post(PATH, json={"messages": [user("Hi")], field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and field in error["param"]


def test_what_asks_for_nothing_is_no_error(client: httpx.Client) -> None:
    neutral = {"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "top_k": -1, "stop": None}
    response = client.post(PATH, json={"messages": [user("Hi")], "max_tokens": 2, **neutral})
    assert response.status_code == 200 and "x-autoglm-ignored" not in response.headers


def test_unknown_fields_are_accepted_and_listed(client: httpx.Client) -> None:
    body = {"messages": [user("Hi")], "max_tokens": 2, "user": "me", "mirostat": 2, "bad\r\nname": 1}
    response = client.post(PATH, json=body)
    assert response.status_code == 200
    assert response.headers["x-autoglm-ignored"] == "user, mirostat, ?"


def test_two_names_of_one_setting_must_agree(client: httpx.Client) -> None:
    body = {"messages": [user("Hi")], "max_tokens": 2, "max_completion_tokens": 3}
    assert "differ" in client.post(PATH, json=body).json()["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hi",
        [{"role": "user"}],
        [{"role": "robot", "content": "Hi"}],
        [{"role": "user", "content": [{"type": "video", "video": "x"}]}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "@@@"}}]}],
    ],
)
def test_messages_that_are_none_are_refused(client: httpx.Client, messages: Any) -> None:
    response = client.post(PATH, json={"messages": messages})
    assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_before_a_stream_begins(client: httpx.Client, stream: bool) -> None:
    response = client.post(PATH, json={"messages": [user("word " * 5000)], "stream": stream})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_module_that_is_off_is_named(client: httpx.Client, wb: lab.Workbench) -> None:
    wb.policy = wb.policy.replace(modules={"vision": "off"})
    error = client.post(PATH, json={"messages": [user("Tap it", screen())]})
    assert error.status_code == 409 and "modules.vision.residency" in error.json()["error"]["message"]


def test_the_model_is_listed_and_another_one_refused(another: Callable[..., httpx.Client]) -> None:
    client = another(names=("phone",))
    names = [model["id"] for model in client.get("/models").json()["data"]]
    assert names == ["autoglm-tiny", "phone"]
    assert client.get("/models/phone").json()["root"] == "autoglm-tiny"
    response = client.post(PATH, json={"model": "gpt-4", "messages": [user("Hi")]})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "there is no model 'gpt-4' here; there is autoglm-tiny, phone"
