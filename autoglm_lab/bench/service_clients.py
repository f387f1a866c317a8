"""Clients of a service, in a process of their own: ``python -m autoglm_lab.bench.service_clients`` with a job on stdin.

The job and what came of it are JSON. Nothing of the model is imported here: what is measured is what a client sees.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import psutil

from autoglm_lab.bench.rude_clients import KINDS, Target, be_rude

_RETRIES = 200
_POLITE = 0.5
_LOOK, _BUSY, _PATIENCE = 0.5, 25.0, 20.0


def run_clients(do: str, **job: Any) -> dict[str, Any]:
    """Let clients of a process of their own do ``load``, ``soak`` or ``turns``.

    Raises:
        RuntimeError: they failed.
    """
    command = [sys.executable, "-m", "autoglm_lab.bench.service_clients"]
    done = subprocess.run(command, input=json.dumps({"do": do, **job}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass
class Tally:
    """What clients saw.

    Attributes:
        right, wrong: answers equal to those given to one client alone, and others.
        failed: requests without an answer, by why.
        retried: times that a client was told to come back.
        tokens: written in all answers.
        first: seconds to the first piece of each answer, retries left out.
        seconds: from the first request to the last answer.
        others: what became of rude clients, by kind and status, where that is in order; what is not is ``failed``.
    """

    right: int = 0
    wrong: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    retried: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    seconds: float = 0.0
    others: dict[str, int] = field(default_factory=dict)

    def note(self, where: dict[str, int], what: str) -> None:
        where[what] = where.get(what, 0) + 1


@dataclass(frozen=True)
class Piece:
    """One streamed answer. ``first``: seconds to its first piece; ``cached``: tokens of the prompt that were reused."""

    text: str
    tokens: int
    first: float
    cached: int


async def ask(client: httpx.AsyncClient, body: dict[str, Any], tally: Tally) -> Piece | None:
    """One answer, streamed; comes back as often as it is told to. None: there was none, which is noted."""
    for _ in range(_RETRIES):
        began, first, text = time.perf_counter(), 0.0, ""
        usage: dict[str, Any] = {}
        try:
            async with client.stream("POST", "chat/completions", json={**body, "stream": True}) as response:
                if response.status_code == 429:
                    tally.retried += 1
                    await asyncio.sleep(float(response.headers["retry-after"]))
                    continue
                if response.status_code != 200:
                    tally.note(tally.failed, f"status {response.status_code}")
                    return None
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        tally.note(tally.failed, str(chunk["error"].get("code")))
                        return None
                    piece = "".join(one["delta"].get("content") or "" for one in chunk["choices"])
                    first = first or (time.perf_counter() - began if piece else 0.0)
                    text += piece
                    usage = chunk.get("usage") or usage
        except httpx.HTTPError as error:
            tally.note(tally.failed, type(error).__name__)
            return None
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Piece(text, usage.get("completion_tokens", 0), first, cached)
    tally.note(tally.failed, "told to come back too often")
    return None


async def load(url: str, bodies: list[dict[str, Any]], clients: int, requests: int, seed: int) -> Tally:
    """Each body once alone, then ``clients`` that ask ``requests`` of them each, in an order of their own."""
    tally = Tally()
    async with _client(url, clients) as client:
        alone = [await ask(client, body, tally) for body in bodies]
        began = time.perf_counter()

        async def one(number: int) -> None:
            chance = random.Random(seed + number)
            for _ in range(requests):
                await _checked(client, bodies, alone, chance, tally)

        await asyncio.gather(*(one(number) for number in range(clients)))
        tally.seconds = time.perf_counter() - began
    return tally


async def soak(
    url: str, key: str, bodies: list[dict[str, Any]], clients: int, seconds: float, seed: int, body_bytes: int
) -> Tally:
    """Clients that ask and check, beside clients of `rude_clients`, for so long; each does something at least once.

    Args:
        body_bytes: the service's limit of one body.
    """
    tally = Tally()
    target = Target(url, key, bodies, body_bytes)
    async with _client(url, clients, key) as client:
        alone = [await ask(client, body, tally) for body in bodies]

        async def one(number: int) -> None:
            chance = random.Random(seed + number)
            while True:
                if chance.random() < _POLITE:
                    await _checked(client, bodies, alone, chance, tally)
                else:
                    came, fine = await be_rude(target, chance.choice(list(KINDS)), chance)
                    tally.note(tally.others if fine else tally.failed, came)
                if time.monotonic() - began > seconds:
                    return

        began = time.monotonic()
        await asyncio.gather(*(one(number) for number in range(clients)))
    tally.seconds = seconds
    return tally


async def turns(
    servers: dict[str, list[str]], prompts: dict[str, list[str]], new: str, tokens: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds to the first piece of a second turn, by server: cold, warm, and warm with several chats in turn.

    Servers are asked in turn, so that whatever else goes on meets all of them, and each figure is taken when the
    machine is quiet, or has not become so in 20 seconds. Every request has a connection of its own, and its time is in
    the figure: some servers say that they keep one and close it a moment after the answer (llama-server does), when the
    next request may be on its way.

    Args:
        servers: the address, ending in ``/v1``, and the model that is asked for (empty: none), by name.
        prompts: distinct long ones for each of ``cold``, ``warm`` and ``held``, which are all held at the same time.
        new: what the second turn says.
        tokens: most of an answer.

    Raises:
        RuntimeError: one gave no answer.
    """
    found = {name: dict[str, list[float]](cold=[], warm=[], held=[]) for name in servers}
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(_client(url, 1)) for name, (url, _) in servers.items()}
        for client in clients.values():
            client.headers["connection"] = "close"

        async def turn(name: str, *messages: dict[str, str]) -> Piece:
            tally, model = Tally(), servers[name][1]
            body = {"messages": messages, "max_tokens": tokens, "temperature": 0, **({"model": model} if model else {})}
            piece = await ask(clients[name], body, tally)
            if piece is None:
                raise RuntimeError(f"no answer from {name} at {servers[name][0]}: {tally.failed}")
            return piece

        async def second(name: str, kind: str, prompt: str, said: str) -> None:
            answer = {"role": "assistant", "content": said}
            await _quiet()
            found[name][kind].append((await turn(name, _user(prompt), answer, _user(new))).first)

        for name in servers:
            await turn(name, _user("warm up"))
        for name, prompt in _in_turn(servers, prompts["cold"]):
            await second(name, "cold", prompt, "Yes.")
        for name, prompt in _in_turn(servers, prompts["warm"]):
            await second(name, "warm", prompt, (await turn(name, _user(prompt))).text)
        said = {}
        for name, prompt in _in_turn(servers, prompts["held"]):
            said[name, prompt] = (await turn(name, _user(prompt))).text
        for name, prompt in _in_turn(servers, prompts["held"]):
            await second(name, "held", prompt, said[name, prompt])
    return found


def _in_turn(servers: Iterable[str], prompts: list[str]) -> Iterator[tuple[str, str]]:
    """Each prompt for every server; another one begins each time."""
    order = deque(servers)
    for prompt in prompts:
        for name in order:
            yield name, prompt
        order.rotate(-1)


async def _quiet() -> None:
    """Wait until the processors have had little to do for a moment, but not for ever."""
    until = time.monotonic() + _PATIENCE
    while await asyncio.to_thread(psutil.cpu_percent, _LOOK) > _BUSY and time.monotonic() < until:
        pass


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _client(url: str, connections: int, key: str | None = None) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections + 1, max_keepalive_connections=connections + 1)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits, trust_env=False)


async def _checked(
    client: httpx.AsyncClient,
    bodies: list[dict[str, Any]],
    alone: list[Piece | None],
    chance: random.Random,
    tally: Tally,
) -> None:
    """Ask one of ``bodies`` and compare the answer with the one that a client got alone."""
    index = chance.randrange(len(bodies))
    piece, expected = await ask(client, bodies[index], tally), alone[index]
    if piece is None or expected is None:
        return
    tally.tokens += piece.tokens
    tally.first.append(piece.first)
    if piece.text == expected.text:
        tally.right += 1
    else:
        tally.wrong += 1


def main() -> None:
    """Do the job on stdin."""
    job = json.load(sys.stdin)
    do: Any = {"load": load, "soak": soak, "turns": turns}[job.pop("do")]
    done = asyncio.run(do(**job))
    json.dump(done if isinstance(done, dict) else asdict(done), sys.stdout)


if __name__ == "__main__":
    main()
