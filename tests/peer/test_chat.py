"""A chat through `lab.connect` with SmolLM2 behind the real servers: what each takes, answers and tells."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import pytest
from PIL import Image

import autoglm_lab as lab
from autoglm_lab.engine.protocol import TextDelta
from autoglm_lab.engine.service_load import ServiceLoad
from autoglm_lab.errors import EndpointError, MessageError, ModuleError, PolicyError
from tests.peer.servers import CONTEXT, Server

LONG = "The harbour lies quiet in the morning. " * 40
PLAIN = {"max_new_tokens": 8, "temperature": 0.0}


def until(holds: Callable[[], bool]) -> None:
    """Wait for what a server does after it has answered."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.05)


def test_the_server_is_recognised(bench: lab.RemoteWorkbench, server: Server) -> None:
    able = bench.engine.capabilities
    assert (able.server, able.model, able.memory_control) == (server.name, server.model, False)
    # transformers serve tells of no model what it takes.
    assert able.context_tokens == (None if server.name == "transformers serve" else CONTEXT)


def test_an_answer_streams_and_its_tokens_are_counted(bench: lab.RemoteWorkbench) -> None:
    turn = bench.chat("Tell me about the sea.", **PLAIN)
    answer = turn.result(120)
    pieces = [event.text for event in turn if isinstance(event, TextDelta)]
    assert len(pieces) > 1 and "".join(pieces) == answer.text
    assert answer.finish_reason == "length" and answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 10
    assert answer.timings.first_token is not None and answer.timings.first_token <= answer.timings.total


def test_the_second_turn_is_told_with_what_was_found_in_the_cache(bench: lab.RemoteWorkbench, server: Server) -> None:
    first = bench.chat(f"{server.name}: {LONG}", **PLAIN).result(120)
    second = bench.chat("And in the evening?", **PLAIN).result(120)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert first.usage.cached_tokens < 100
    if server.name == "transformers serve":  # it keeps no keys and values between requests
        assert second.usage.cached_tokens == 0
    else:
        assert second.usage.cached_tokens > 200
    (info,) = bench.conversations
    assert (info.turns, info.kv_bytes) == (2, None)


def test_every_setting_is_taken_or_said_to_be_left_out(bench: lab.RemoteWorkbench, server: Server) -> None:
    answer = bench.chat(
        "Count to three.",
        max_new_tokens=12,
        min_new_tokens=12,
        temperature=0.7,
        top_p=0.9,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        stop=("zzz",),
        eos=False,
        thinking=True,
        seed=1,
    ).result(120)
    assert answer.finish_reason == "length" and answer.usage.completion_tokens == 12
    left_out = {event.subject.removeprefix("generation.") for event in bench.events if "does not take" in event.why}
    assert (
        left_out
        == {
            "vLLM": set(),
            "llama.cpp": {"min_new_tokens"},
            "transformers serve": {"frequency_penalty", "presence_penalty", "eos"},
        }[server.name]
    )


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.5, "seed": 1}, {"repetition_penalty": 1.8}, {"max_new_tokens": 3}]
)
def test_a_setting_changes_the_answer(bench: lab.RemoteWorkbench, settings: dict[str, float]) -> None:
    plain, changed = (
        bench.chat("Tell me about the sea, the sea, the sea.", conversation=name, **{**PLAIN, **asked}).result(120)
        for name, asked in (("a", {"max_new_tokens": 24}), ("b", {"max_new_tokens": 24, **settings}))
    )
    assert plain.text != changed.text


def test_a_stop_text_ends_the_answer(bench: lab.RemoteWorkbench) -> None:
    plain = bench.chat("Tell me about the sea.", conversation="a", max_new_tokens=24).result(120)
    word = plain.text.split()[3]
    stopped = bench.chat("Tell me about the sea.", conversation="b", max_new_tokens=24, stop=(word,)).result(120)
    assert stopped.finish_reason == "stop"
    assert stopped.usage.completion_tokens < plain.usage.completion_tokens


def test_its_metrics_are_shown_and_what_it_does_not_tell_is_not_available(
    bench: lab.RemoteWorkbench, server: Server
) -> None:
    bench.chat("Tell me about the sea.", **PLAIN).result(120)
    load = bench.engine.load
    if server.name == "transformers serve":
        assert load is None
    else:
        assert isinstance(load, ServiceLoad)
        assert load.kv_capacity is not None and load.kv_capacity >= CONTEXT
        assert load.kv_share is not None and 0 <= load.kv_share <= 1
        assert load.waiting == 0 and load.prefix_hits is not None
    ledger = bench.memory
    assert ledger.total is None and ledger.process is None
    assert all(row.nbytes is None for row in ledger.rows)
    assert server.name in ledger.notes[0]
    assert "n/a" in str(ledger) and "0 B" not in str(ledger)


def test_an_answer_under_way_shows_and_ends_on_the_server_when_it_is_stopped(
    bench: lab.RemoteWorkbench, server: Server
) -> None:
    turn = bench.chat("Write a very long story.", max_new_tokens=1500)
    until(lambda: bool(turn.text))
    if server.name != "transformers serve":
        until(lambda: bench.engine.load is not None and bench.engine.load.running == 1)
        assert bench.memory.phase == "decode"
    turn.cancel()
    assert turn.result(60).finish_reason == "cancelled"
    if server.name != "transformers serve":
        until(lambda: bench.engine.load is not None and bench.engine.load.running == 0)
    assert bench.chat("And now?", conversation="b", **PLAIN).result(120).usage.completion_tokens == 8


def test_what_it_refuses_is_told_in_its_words(bench: lab.RemoteWorkbench, server: Server) -> None:
    if server.name == "transformers serve":
        with closing(lab.connect(server.url, model="another")) as other:
            turn = other.chat("Hello")
            with pytest.raises(EndpointError, match=r"refused the question \(400\): Server is pinned to"):
                turn.result(120)
        return
    with pytest.raises(EndpointError, match=rf"refused the question \(400\): .*{CONTEXT}"):
        bench.chat("word " * 2 * CONTEXT, **PLAIN).result(120)
    with pytest.raises(EndpointError, match=f"has no model 'another'; it has {server.model}"):
        lab.connect(server.url, model="another")


def test_an_image_that_the_model_cannot_read_is_refused_or_said_to_be_dropped(
    bench: lab.RemoteWorkbench, server: Server
) -> None:
    image = Image.new("RGB", (64, 64), "red")
    if server.name == "llama.cpp":  # it tells what its model takes
        with pytest.raises(MessageError, match="takes text: leave the image out"):
            bench.chat("What is this?", image=image)
    elif server.name == "vLLM":
        with pytest.raises(EndpointError, match="is not a multimodal model"):
            bench.chat("What is this?", image=image, **PLAIN).result(120)
    else:
        bench.chat("What is this?", image=image, **PLAIN).result(120)
        assert any("leaves it out without a word" in event.why and event.subject == "image" for event in bench.events)


def test_its_memory_is_not_set_from_here(bench: lab.RemoteWorkbench, server: Server) -> None:
    with pytest.raises(PolicyError, match=f"the memory of {server.name} is not set from here: kv cannot be changed"):
        bench.policy = bench.policy.replace(kv={"max_tokens": 64})
    with pytest.raises(ModuleError, match=f"{server.name} cannot plan from here"):
        bench.plan()
