"""An engine behind servers that are not ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import autoglm_lab as lab
from autoglm_lab.engine.protocol import ReasoningDelta, TextDelta
from autoglm_lab.engine.remote import engine as remote
from autoglm_lab.engine.service_load import ServiceLoad
from autoglm_lab.errors import (
    ConversationError,
    EndpointError,
    EngineClosedError,
    MessageError,
    ModuleError,
    PolicyError,
)
from tests.unit.engine import peers
from tests.unit.engine.peers import Peer, PeerServer

Opened = Callable[..., lab.RemoteWorkbench]
THINKERS = [peers.vllm, peers.sglang, peers.llama, peers.transformers]
ALL = [*THINKERS, peers.other]
NAMES = dict(zip(ALL, ("vLLM", "SGLang", "llama.cpp", "transformers serve", "this server"), strict=True))


@pytest.fixture
def connect() -> Iterator[Opened]:
    """Starts a fake server and connects to it."""
    open_ones: list[Any] = []

    def opened(peer: Peer, **settings: Any) -> lab.RemoteWorkbench:
        open_ones.append(PeerServer(peer))
        bench = lab.connect(peer.url, **settings)
        open_ones.append(bench)
        return bench

    yield opened
    for one in reversed(open_ones):
        one.close()


@pytest.mark.parametrize("make", ALL)
def test_a_server_is_recognised(make: Callable[[], Peer], connect: Opened) -> None:
    able = connect(make()).engine.capabilities
    assert able.server == NAMES[make]
    assert able.where.endswith(NAMES[make]) and not able.memory_control


def test_what_a_server_tells_of_its_model_is_known(connect: Opened) -> None:
    assert connect(peers.vllm()).engine.capabilities.context_tokens == 4096
    able = connect(peers.llama()).engine.capabilities
    assert able.context_tokens == 4096 and able.modalities == ("text", "image")
    assert connect(peers.other()).engine.capabilities.context_tokens is None


@pytest.mark.parametrize("make", THINKERS)
def test_the_thought_is_kept_apart_from_the_answer(make: Callable[[], Peer], connect: Opened) -> None:
    turn = connect(make()).chat("hello", thinking=True)
    answer = turn.result(20)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("Hello there", "Let me see.", "stop")
    assert "".join(one.text for one in turn if isinstance(one, TextDelta)) == answer.text
    assert "".join(one.text for one in turn if isinstance(one, ReasoningDelta)) == answer.reasoning
    assert answer.timings.first_token is not None and answer.timings.first_token <= answer.timings.total


def test_usage_and_what_was_found_in_the_cache_are_kept(connect: Opened) -> None:
    bench = connect(peers.vllm())
    usage = bench.chat("hello").result(20).usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (40, 32, 3)
    (info,) = bench.conversations
    assert (info.name, info.turns, info.tokens, info.kv_bytes, info.reused_share) == ("main", 1, 43, None, 0.8)


@pytest.mark.parametrize(
    ("make", "said", "unsaid"),
    [
        (peers.vllm, {"repetition_penalty": 1.2, "min_tokens": 4, "ignore_eos": True}, set()),
        (peers.llama, {"repeat_penalty": 1.2, "ignore_eos": True}, {"min_tokens", "repetition_penalty"}),
        (
            peers.transformers,
            {"generation_config": '{"do_sample": true, "top_k": 0, "min_new_tokens": 4, "repetition_penalty": 1.2}'},
            {"repeat_penalty", "ignore_eos", "presence_penalty", "frequency_penalty"},
        ),
    ],
)
def test_each_server_is_asked_in_its_own_words(
    make: Callable[[], Peer], said: dict[str, Any], unsaid: set[str], connect: Opened
) -> None:
    peer = make()
    bench = connect(peer)
    settings = {"repetition_penalty": 1.2, "min_new_tokens": 4, "eos": False, "stop": ("END",), "presence_penalty": 1.0}
    bench.chat("hello", temperature=0.5, max_new_tokens=9, **settings).result(20)
    (body,) = peer.asked
    assert body | said | {"temperature": 0.5, "max_tokens": 9, "stop": ["END"], "stream": True} == body
    assert not unsaid & set(body) and "max_completion_tokens" not in body
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    noted = {event.subject.removeprefix("generation.") for event in bench.events if "does not take" in event.why}
    assert noted == {name for name, field in _NAMES.items() if field in unsaid and field not in said}


_NAMES = {"min_new_tokens": "min_tokens", "eos": "ignore_eos", "presence_penalty": "presence_penalty"}


def test_the_history_is_sent_again_with_its_pictures(connect: Opened, picture: Any) -> None:
    peer = peers.vllm()
    bench = connect(peer)
    bench.chat("what is this?", image=picture, system="be brief").result(20)
    bench.chat("and now?").result(20)
    bench.chat("elsewhere", conversation="b").result(20)
    roles = [[message["role"] for message in body["messages"]] for body in peer.asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["user"]]
    kinds = [part["type"] for part in peer.asked[1]["messages"][1]["content"]]
    assert kinds == ["image_url", "text"]
    assert peer.asked[1]["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert peer.asked[1]["messages"][2]["content"] == "Hello there"


def test_the_policy_strips_pictures_of_earlier_turns(connect: Opened, picture: Any, sound: Any) -> None:
    peer = peers.vllm()
    bench = connect(peer)
    bench.policy = bench.policy.replace(history={"media": "strip"})
    bench.chat("what is this?", image=picture).result(20)
    bench.chat(image=picture, audio=sound).result(20)
    bench.chat("and now?", image=picture).result(20)
    messages = peer.asked[2]["messages"]
    assert [message["content"] for message in messages[:4]] == [
        "what is this?",
        "Hello there",
        "(media)",
        "Hello there",
    ]
    assert [part["type"] for part in messages[4]["content"]] == ["image_url", "text"]
    assert [part["type"] for part in peer.asked[1]["messages"][2]["content"]] == ["image_url", "input_audio"]


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (peers.vllm, ServiceLoad(0.25, 8000, 2000, 2, 1, 0.6)),
        (peers.sglang, ServiceLoad(0.5, 8000, 4000, 3, 0, 0.1)),
        (peers.llama, ServiceLoad(128 / 8192, 8192, 128, 1, 4, None)),
        (peers.transformers, None),
        (peers.other, None),
    ],
)
def test_metrics_are_told_and_what_they_do_not_tell_is_none(
    make: Callable[[], Peer], load: ServiceLoad | None, connect: Opened
) -> None:
    bench = connect(make())
    assert bench.engine.load == load
    ledger = bench.memory
    assert ledger.total is None and ledger.process is None
    assert all(row.nbytes is None for row in ledger.rows)
    assert NAMES[make] in ledger.notes[0]
    assert "n/a" in str(ledger) and "0 B" not in str(ledger)


def test_a_server_without_metrics_tells_nothing(connect: Opened) -> None:
    peer = peers.vllm()
    del peer.pages["/metrics"]
    assert connect(peer).engine.load == ServiceLoad()
    peer = peers.sglang()
    peer.pages["/metrics"] = "<html>no metrics</html>"
    assert connect(peer).engine.load == ServiceLoad()


def test_memory_that_is_not_ours_is_not_set(connect: Opened) -> None:
    bench = connect(peers.vllm())
    with pytest.raises(PolicyError, match=r"the memory of vLLM is not set from here: budget, kv cannot be changed"):
        bench.policy = bench.policy.replace(kv={"max_tokens": 64}, budget="1GiB")
    with pytest.raises(ModuleError, match="vLLM cannot move modules from here"):
        bench.engine.park("vision")
    with pytest.raises(ModuleError, match="vLLM cannot give memory back"):
        bench.reclaim()
    with pytest.raises(ModuleError, match="vLLM cannot plan"):
        bench.plan()
    bench.policy = bench.policy.replace(generation={"temperature": 0.7})
    assert bench.policy.generation.temperature == 0.7 and bench.policy.budget is None


def test_a_conversation_is_forgotten(connect: Opened) -> None:
    bench = connect(peers.vllm())
    bench.chat("hello").result(20)
    bench.drop("main")
    assert bench.conversations == ()
    with pytest.raises(ConversationError, match="there is no conversation 'main'; there are: none"):
        bench.drop("main")


def test_a_stream_that_is_cut_says_what_was_received(connect: Opened) -> None:
    peer = peers.vllm()
    peer.breaks = "cut"
    bench = connect(peer)
    turn = bench.chat("hello")
    with pytest.raises(
        EndpointError, match=r"broke off .* 11 characters of the thought and 11 characters of the answer"
    ):
        turn.result(20)
    assert turn.text == "Hello there"
    assert bench.conversations == ()  # as before the turn
    peer.breaks = "done"
    assert bench.chat("again").result(20).text == "Hello there"


def test_an_answer_without_an_end_is_not_taken_for_whole(connect: Opened) -> None:
    peer = peers.sglang()
    peer.breaks = "short"
    with pytest.raises(EndpointError, match="ended the stream before the answer was finished"):
        connect(peer).chat("hello").result(20)


def test_an_error_in_the_stream_is_told(connect: Opened) -> None:
    peer = peers.vllm()
    peer.breaks = "error"
    with pytest.raises(EndpointError, match="the device is on fire"):
        connect(peer).chat("hello").result(20)


def test_a_silent_server_is_given_up(connect: Opened) -> None:
    peer = peers.vllm()
    peer.breaks = "hang"
    with pytest.raises(EndpointError, match=r"sent nothing for too long .* 11 characters of the answer"):
        connect(peer, timeout=0.2).chat("hello").result(20)
    assert peer.gone.wait(20)


def test_cancelling_closes_the_stream_and_keeps_what_came(connect: Opened) -> None:
    peer = peers.vllm()
    peer.breaks = "hang"
    bench = connect(peer)
    turn = bench.chat("hello")
    for event in turn:
        if turn.text == "Hello there":
            turn.cancel()
            break
        assert event
    answer = turn.result(20)
    assert (answer.finish_reason, answer.text) == ("cancelled", "Hello there")
    assert peer.gone.wait(20)
    peer.breaks = "done"
    bench.chat("go on").result(20)
    assert [message["role"] for message in peer.asked[-1]["messages"]] == ["user", "assistant", "user"]


def test_stop_ends_every_turn(connect: Opened) -> None:
    peer = peers.vllm()
    peer.breaks = "hang"
    bench = connect(peer)
    turns = [bench.chat("hello"), bench.chat("waits for the first")]
    next(iter(turns[0]))
    bench.stop()
    assert [turn.result(20).finish_reason for turn in turns] == ["cancelled", "cancelled"]


def test_no_server_is_said_in_one_line() -> None:
    with pytest.raises(EndpointError, match=r"^there is no server at 127.0.0.1:9: start it, or check the address"):
        lab.connect("127.0.0.1:9")


def test_a_server_that_went_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRIES", 0)
    peer = peers.vllm()
    server = PeerServer(peer)
    bench = lab.connect(peer.url)
    server.close()
    with pytest.raises(EndpointError, match=r"there is no server at 127\.0\.0\.1"):
        bench.chat("hello").result(30)
    bench.close()
    assert not bench.sampler.running


def test_a_wrong_key_is_said_in_one_line(connect: Opened) -> None:
    peer = peers.vllm()
    peer.key = "right"
    with pytest.raises(
        EndpointError, match=r"refused the key for GET /v1/models \(401\): give the right one as api_key="
    ):
        connect(peer, api_key="wrong")
    assert connect(peer, api_key="right").name == "m"


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ({}, "is .* the base of an OpenAI-compatible API"),
        ({"/v1/models": "<html>hello</html>"}, "text/plain instead of JSON"),
        ({"/v1/models": {"models": []}}, "lists no models as OpenAI's API does"),
        ({"/v1/models": {"data": []}}, "lists no model: name one with model="),
    ],
)
def test_what_is_no_openai_server_is_said(pages: dict[str, Any], message: str, connect: Opened) -> None:
    with pytest.raises(EndpointError, match=message):
        connect(Peer(pages))


def test_an_unknown_model_names_those_there_are(connect: Opened) -> None:
    with pytest.raises(EndpointError, match="has no model 'x'; it has m"):
        connect(peers.vllm(), model="x")
    assert connect(peers.transformers(), model="any/one").name == "any/one"  # it loads what it is asked for


@pytest.mark.parametrize("url", ["", "ftp://x/v1", "http://:8000", "http://x:99999"])
def test_what_is_no_url_is_said(url: str) -> None:
    with pytest.raises(EndpointError, match="is no endpoint: give a URL such as"):
        lab.connect(url)


def test_what_the_model_does_not_take_is_refused_before_it_is_sent(connect: Opened, sound: Any) -> None:
    peer = peers.llama()
    bench = connect(peer)
    with pytest.raises(MessageError, match="m takes text, image: leave the audio out"):
        bench.chat("what do you hear?", audio=sound)
    with pytest.raises(MessageError, match="takes no live sound: send it whole"):
        bench.chat(live=True)
    assert peer.asked == []


def test_a_closed_connection_says_so(connect: Opened) -> None:
    bench = connect(peers.vllm())
    bench.close()
    assert repr(bench) == "m (closed)"
    with pytest.raises(EngineClosedError, match="connect again"):
        bench.chat("hello")
