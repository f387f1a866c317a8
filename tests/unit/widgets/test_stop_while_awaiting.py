"""Stop in the dashboard works while a cell awaits the answer: a real kernel, and the message that the button sends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("ipykernel")
manager = pytest.importorskip("jupyter_client.manager")


@pytest.fixture
def client() -> Iterator[Any]:
    kernel, client = manager.start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    kernel.shutdown_kernel(now=True)
    kernel.cleanup_resources()


def run(client: Any, code: str) -> str:
    printed: list[str] = []
    client.execute_interactive(
        code, timeout=120, output_hook=lambda message: printed.append(message["content"].get("text", ""))
    )
    return "".join(printed).strip()


def test_stop_reaches_an_answer_that_a_cell_awaits(client: Any) -> None:
    header = run(
        client,
        "import autoglm_lab as lab\n"
        "wb = lab.load('autoglm-tiny', device='cpu')\n"
        "board = wb.dashboard()\n"
        "print(board.header.model_id)",
    ).split()[-1]
    press = {"comm_id": header, "data": {"method": "custom", "content": {"do": "stop"}}}
    later = threading.Timer(2.0, lambda: client.shell_channel.send(client.session.msg("comm_msg", press)))
    later.start()
    answered = run(
        client,
        "answer = await wb.chat('Who are you?', max_new_tokens=4000, min_new_tokens=3900)\n"
        "print(answer.finish_reason, answer.usage.completion_tokens)",
    )
    later.join()
    reason, tokens = answered.split()[-2:]
    assert reason == "cancelled"
    assert 0 < int(tokens) < 3900
