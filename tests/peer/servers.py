"""Servers of other projects as programs, from the environments that ``make peers`` makes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

PEERS = Path(__file__).parents[2] / ".peers"
CONTEXT = 2048
"""Tokens of a conversation."""
VLLM_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
NOTHING: Mapping[str, str] = {}
_START_SECONDS, _STOP_SECONDS = 280, 30


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        name: as `engine.remote.dialect` has it.
        url: the base of its OpenAI API.
        model: the name that requests carry.
        key: that it asks for.
    """

    name: str
    url: str
    model: str
    key: str = "EMPTY"


def vllm(smollm2: Path, log: Path, *, every_core: bool = False) -> AbstractContextManager[Server]:
    """vLLM on the CPU, which tells cached tokens only where it is told to.

    Args:
        every_core: it leaves one to others, where it is not told to take all.
    """
    port, model = free_port(), smollm2 / "model"
    words = [str(needed("vllm", "bin", "vllm")), "serve", str(model), "--served-model-name", "smollm2"]
    words += ["--port", str(port), "--enforce-eager", "--max-model-len", str(CONTEXT), "--enable-prompt-tokens-details"]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    env = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"} if every_core else {}
    return running(words, Server("vLLM", _url(port), "smollm2"), log, {**VLLM_ENV, **env})


def transformers_serve(smollm2: Path, log: Path) -> AbstractContextManager[Server]:
    """``transformers serve``, pinned to the model; it lists no model that is a folder."""
    port, model = free_port(), str(smollm2 / "model")
    words = [str(needed("transformers", "bin", "transformers")), "serve", model, "--port", str(port), "--device", "cpu"]
    return running(words, Server("transformers serve", _url(port), model), log)


def llama_server(smollm2: Path, log: Path, chats: int = 4, threads: int = 1) -> AbstractContextManager[Server]:
    """``llama-server`` with slots for so many conversations; its metrics and its slots are shown.

    Args:
        threads: several wait for one another without sleeping, which takes minutes where other work goes on.
    """
    port = free_port()
    words = [str(needed("llama-server", "bin", "llama-server")), "--model", str(smollm2 / "smollm2.gguf")]
    words += ["--port", str(port), "--ctx-size", str(chats * CONTEXT), "--parallel", str(chats)]
    words += ["--threads", str(threads), "--metrics", "--slots", "--alias", "smollm2"]
    return running(words, Server("llama.cpp", _url(port), "smollm2"), log)


def needed(*parts: str) -> Path:
    """A file of a peer; the test is skipped where it is not installed."""
    path = PEERS.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not in {PEERS.name}: make peers")
    return path


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextmanager
def running(words: Sequence[str], server: Server, log: Path, env: Mapping[str, str] = NOTHING) -> Iterator[Server]:
    """A server while the test runs.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of what it wrote.
    """
    with log.open("wb") as written:
        program = subprocess.Popen(
            list(words), stdout=written, stderr=subprocess.STDOUT, env={**os.environ, **env}, start_new_session=True
        )
    try:
        _await_answer(program, server, log)
        yield server
    finally:
        _stop(program)


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1"


def _await_answer(program: subprocess.Popen[bytes], server: Server, log: Path) -> None:
    # transformers serve cannot list its models where none was fetched from the hub.
    page = server.url.removesuffix("/v1") + "/health"
    end = time.monotonic() + _START_SECONDS
    with httpx.Client(timeout=5, trust_env=False) as client:
        while program.poll() is None and time.monotonic() < end:
            try:
                if client.get(page).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
    said = log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"{server.name} does not answer; it wrote:\n{said}")


def _stop(program: subprocess.Popen[bytes]) -> None:
    """End it and what it started: it leads a group of its own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(program.pid, sign)
        except ProcessLookupError:
            break
        try:
            program.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
