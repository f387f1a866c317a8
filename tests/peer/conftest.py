"""SmolLM2 behind servers of other projects, one after the other; each test is skipped where its server is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import autoglm_lab as lab
from tests.peer.servers import Server, llama_server, needed, transformers_serve, vllm

Start = Callable[[Path, Path], AbstractContextManager[Server]]
STARTS: dict[str, Start] = {
    "vLLM": vllm,
    "transformers serve": transformers_serve,
    "llama.cpp": llama_server,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.peer)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session", params=STARTS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One of the servers, with SmolLM2."""
    smollm2 = needed("smollm2", "model", "model.safetensors").parents[1]
    with STARTS[request.param](smollm2, tmp_path_factory.mktemp("server") / "log") as started:
        yield started


@pytest.fixture
def bench(server: Server) -> Iterator[lab.RemoteWorkbench]:
    """Connected to it, nothing said yet."""
    bench = lab.connect(server.url, model=server.model)
    yield bench
    bench.close()
