"""``autoglm-lab serve --engine vllm`` becomes a vLLM that runs with the settings of a policy."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import autoglm_lab as lab
from autoglm_lab.errors import EndpointError
from tests.peer.servers import VLLM_ENV, Server, free_port, needed, running
from tests.peer.tiny_phone import write_tiny_phone

SIDE, IMAGES = 224, 2
# As many as the family takes for such an image, and the two markers around them.
IMAGE_TOKENS = (SIDE // 28) ** 2 + 2
POLICY = """\
kv: {max_tokens: 1024, graphs: false}
generation: {max_new_tokens: 6}
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """What the command has become, and what it wrote before and since."""
    vllm = needed("vllm", "bin", "vllm")
    folder = tmp_path_factory.mktemp("scale-out")
    model, policy, log, port = folder / "model", folder / "policy.yaml", folder / "log", free_port()
    write_tiny_phone(model)
    policy.write_text(POLICY)
    words = [
        str(Path(sys.executable).with_name("autoglm-lab")),
        "serve",
        str(model),
        "--engine",
        "vllm",
        "--name",
        "phone",
    ]
    words += ["--policy", str(policy), "--port", str(port), "--images", str(IMAGES)]
    # The environment of vLLM comes first: its command is found there, with its own interpreter.
    path = os.pathsep.join([str(vllm.parent), os.environ["PATH"]])
    server = Server("vLLM", f"http://127.0.0.1:{port}/v1", "phone", key="secret")
    env = {**VLLM_ENV, "PATH": path, "AUTOGLM_LAB_API_KEY": "secret"}
    with running(words, server, log, env) as started:
        yield started, log


@pytest.fixture
def bench(served: tuple[Server, Path]) -> Iterator[lab.RemoteWorkbench]:
    bench = lab.connect(served[0].url, api_key="secret")
    yield bench
    bench.close()


def test_the_command_is_printed_and_is_what_runs(served: tuple[Server, Path], bench: lab.RemoteWorkbench) -> None:
    printed = served[1].read_text().partition("\n\n")[0]
    assert "vllm serve" in printed and "--max-model-len 1024" in printed and "secret" not in printed
    assert bench.engine.capabilities.server == "vLLM"
    assert bench.engine.capabilities.context_tokens == 1024
    assert bench.name == "phone"


def test_the_key_is_asked_for(served: tuple[Server, Path]) -> None:
    with pytest.raises(EndpointError, match="refused the key"):
        lab.connect(served[0].url, api_key="another")


def test_an_image_goes_through(bench: lab.RemoteWorkbench) -> None:
    plain = bench.chat("What is on it?", conversation="a").result(120)
    image = Image.new("RGB", (SIDE, SIDE), "red")
    seen = bench.chat("What is on it?", image=image, conversation="b").result(120)
    assert seen.usage.prompt_tokens - plain.usage.prompt_tokens == IMAGE_TOKENS
    assert seen.usage.completion_tokens > 0


def test_its_history_is_sent_again_with_the_image(bench: lab.RemoteWorkbench) -> None:
    first = bench.chat("What is on it?", image=Image.new("RGB", (SIDE, SIDE), "blue")).result(120)
    second = bench.chat("And below?").result(120)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens > IMAGE_TOKENS
    bench.policy = bench.policy.replace(history={"media": "strip"})
    third = bench.chat("And above?").result(120)
    assert third.usage.prompt_tokens < second.usage.prompt_tokens


def test_more_images_than_were_allowed_are_refused(bench: lab.RemoteWorkbench) -> None:
    pictures = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "green", "blue")]
    with pytest.raises(EndpointError, match=rf"(?i)at most {IMAGES}"):
        bench.chat("Which differ?", images=pictures).result(120)
