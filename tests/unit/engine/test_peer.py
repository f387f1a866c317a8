"""What is behind an endpoint, where it answers otherwise than OpenAI's API has it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing

import httpx
import pytest

import autoglm_lab as lab
from autoglm_lab.engine.remote.dialect import TRANSFORMERS
from autoglm_lab.engine.remote.link import Link
from autoglm_lab.engine.remote.peer import find_peer
from autoglm_lab.engine.service_load import llama_load, sglang_load
from autoglm_lab.errors import EndpointError
from tests.unit.engine import peers
from tests.unit.engine.peers import Peer, PeerServer

Answer = Callable[[httpx.Request], httpx.Response]


def link_to(answer: Answer) -> Link:
    """A link whose requests ``answer`` gets."""
    link = Link("http://127.0.0.1:1/v1")
    link.client.close()
    link.client = httpx.Client(transport=httpx.MockTransport(answer))
    return link


@pytest.fixture
def unlisted() -> Iterator[Peer]:
    """``transformers serve`` on a machine that never fetched a model from the hub."""
    peer = peers.transformers()
    del peer.pages["/v1/models"]
    with closing(PeerServer(peer)):
        yield peer


def test_a_server_that_cannot_list_its_models_is_known_by_its_pages(unlisted: Peer) -> None:
    with closing(lab.connect(unlisted.url, model="/models/smollm2")) as bench:
        assert (bench.engine.capabilities.server, bench.name) == ("transformers serve", "/models/smollm2")
        assert bench.chat("hello").result(20).text == "Hello there"
    with pytest.raises(EndpointError, match="lists no model: name one with model="):
        lab.connect(unlisted.url)


def test_any_other_server_has_to_list_its_models() -> None:
    peer = peers.vllm()
    del peer.pages["/v1/models"]
    with closing(PeerServer(peer)), pytest.raises(EndpointError, match="has no GET /v1/models"):
        lab.connect(peer.url, model="m")


def test_an_image_that_may_be_dropped_in_silence_is_noted_once(unlisted: Peer, picture: object) -> None:
    with closing(lab.connect(unlisted.url, model="m")) as bench:
        bench.chat("what is this?", image=picture).result(20)
        bench.chat("and this?", image=picture).result(20)
        notes = [event for event in bench.events if "leaves it out without a word" in event.why]
        assert [(event.kind, event.subject) for event in notes] == [("note", "image")]


@pytest.mark.parametrize("lost", [httpx.RemoteProtocolError("closed"), httpx.ReadError("reset")])
def test_a_question_is_asked_again_where_a_kept_connection_was_closed(lost: Exception) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if len(asked) == 1:
            raise lost
        return httpx.Response(200, json={"fine": True})

    with closing(link_to(answer)) as link:
        assert link.ask("GET", "/v1/models") == {"fine": True}
        assert asked == ["GET", "GET"]
        asked.clear()
        # What changes something may have been done.
        with pytest.raises(EndpointError, match="the connection to"):
            link.ask("POST", "/v1/memory/reclaim")
        assert asked == ["POST"]


def test_a_server_that_is_gone_is_asked_twice_at_most() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        raise httpx.ReadError("reset")

    with (
        closing(link_to(answer)) as link,
        pytest.raises(EndpointError, match=r"the connection to 127\.0\.0\.1:1 failed: reset"),
    ):
        find_peer(link)
    assert asked == ["GET"] * 4  # its models, and whether it is transformers serve


@pytest.mark.parametrize(("temperature", "sampled"), [(0.0, False), (0.7, True)])
def test_transformers_serve_is_told_to_sample_where_there_is_a_temperature(temperature: float, sampled: bool) -> None:
    settings = lab.MemoryPolicy(generation={"temperature": temperature}).generation.model_dump()
    request = TRANSFORMERS.request(settings)
    config = json.loads(request["extra_body"]["generation_config"])
    assert config == {"do_sample": sampled, "top_k": 0, "min_new_tokens": 0, "repetition_penalty": 1.0}
    assert request["temperature"] == temperature


def test_sglang_is_known_by_its_pages_where_its_models_have_another_owner() -> None:
    peer = peers.sglang()
    peer.pages["/v1/models"] = peers.models("someone")
    # Both have /tokenize.
    peer.pages["/openapi.json"] = {"paths": {"/flush_cache": {}, "/tokenize": {}}}
    with closing(PeerServer(peer)), closing(lab.connect(peer.url)) as bench:
        assert bench.engine.capabilities.server == "SGLang"


def test_requests_that_sglang_counts_again_by_priority_are_counted_once() -> None:
    by_priority = "".join(
        f'sglang:num_running_reqs{{model_name="m",priority="{priority}"}} {count}\n'
        for priority, count in (("", 3), ("0", 2), ("5", 1))
    )
    assert sglang_load(by_priority).running == 3


def test_what_llama_server_holds_is_read_from_its_slots() -> None:
    metrics = "llamacpp:prompt_tokens_total 300\nllamacpp:prompt_tokens_cached_total 100\n"
    slots = [
        {"id": 0, "n_ctx": 2048, "is_processing": True, "n_prompt_tokens": 400, "n_prompt_tokens_cache": 100},
        {"id": 1, "n_ctx": 2048, "is_processing": False},  # never asked
    ]
    load = llama_load(metrics, slots)
    assert (load.kv_tokens, load.kv_capacity, load.running, load.prefix_hits) == (400, 4096, 1, 0.25)
    assert llama_load("llamacpp:prompt_tokens_total 300\n", slots).prefix_hits is None
