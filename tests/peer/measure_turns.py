"""`autoglm-lab bench serve` beside every server that `make peers` made: ``python -m tests.peer.measure_turns``.

They run at the same time, each on every core, and idle while another one is asked. Ours and transformers compute in
float32, as the model is stored; vLLM rounds it to bfloat16, and so does a second one of ours; llama.cpp reads it in 4
bits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.peer.servers import PEERS, llama_server, transformers_serve, vllm

CHATS = 9
"""Conversations that a server is to hold: eight in turn, and one."""


def main() -> None:
    """Start them, measure, and end them."""
    smollm2 = PEERS / "smollm2"
    with ExitStack() as stack:
        logs = Path(stack.enter_context(TemporaryDirectory()))
        started = [
            stack.enter_context(transformers_serve(smollm2, logs / "transformers")),
            stack.enter_context(vllm(smollm2, logs / "vllm", every_core=True)),
            stack.enter_context(llama_server(smollm2, logs / "llama", chats=CHATS, threads=os.cpu_count() or 1)),
        ]
        named = ",".join(f"{server.name}={server.url}#{server.model}" for server in started)
        command = [str(Path(sys.executable).with_name("autoglm-lab")), "bench", "serve"]
        command += ["--smollm2", str(smollm2 / "model"), *sys.argv[1:]]
        subprocess.run(command, env={**os.environ, "AUTOGLM_LAB_BENCH_PEERS": named}, check=True)


if __name__ == "__main__":
    main()
