"""The service under load: every answer right, bytes as before, and many clients faster than one."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from autoglm_lab import samples
from autoglm_lab.bench.bench import Bench
from autoglm_lab.bench.prompts import text_of
from autoglm_lab.bench.report import Figure, Report
from autoglm_lab.opening import load
from autoglm_lab.serving import serve
from autoglm_lab.workbench import Workbench

_CLIENTS, _REQUESTS, _SEED = 64, 10, 2026
_FASTER, _WARM = 3.0, 0.10
_OWNED = ("weights", "kv", "owner")
_PROMPT_TOKENS, _CHATS = 1300, 8
_PEERS = "AUTOGLM_LAB_BENCH_PEERS"


def run(bench: Bench) -> Report:
    """Mixed requests of 64 clients; 16 clients beside one; two turns of SmolLM2 where a folder of it was given."""
    wb = bench.exact
    wb.policy = wb.policy.replace(generation={"max_new_tokens": 64})
    bodies = _mixed()
    with serve(wb, port=0, running=32, waiting=24) as service:
        bench.say("warm-up: every request by one client, then by several")
        _clients("load", url=service.url, bodies=bodies, clients=8, requests=4, seed=0)
        before = _owned(wb)
        bench.say(f"{_CLIENTS} clients, {_REQUESTS} requests each: text, images, sounds")
        mixed = _clients("load", url=service.url, bodies=bodies, clients=_CLIENTS, requests=_REQUESTS, seed=_SEED)
        figures = _load_figures(mixed, before, _owned(wb))
        if bench.minutes:
            bench.say(f"{bench.minutes:g} minutes of clients that vanish, send garbage and go over limits")
            soaked = _clients(
                "soak", url=service.url, bodies=bodies, clients=16, seconds=60 * bench.minutes, seed=_SEED
            )
            figures += _soak_figures(soaked, before, _owned(wb))
        bench.say("throughput: one client, then 16")
        text = [{**body, "ignore_eos": True} for body in bodies[:2]]
        rates: dict[int, list[float]] = {}
        for clients, requests in ((1, 8), (16, 4), (1, 8), (16, 4)):
            done = _clients("load", url=service.url, bodies=text, clients=clients, requests=requests, seed=1)
            rates.setdefault(clients, []).append(done["tokens"] / done["seconds"])
    one, many = median(rates[1]), median(rates[16])
    bar = f">= {_FASTER:g} x one client"
    figures.append(Figure("16 clients, text", "tokens/s", many, {"one client": one}, bar=bar, meets=many >= 3 * one))
    if bench.smollm2 is not None:
        figures += _two_turns(bench, bench.smollm2)
    return bench.report(
        "serve",
        figures,
        "The clients run in a process of their own on the same machine and take their share of its cores. "
        "An answer is right when it is the one that a client alone got.",
    )


def _load_figures(done: dict[str, Any], before: int, after: int) -> list[Figure]:
    wanted, answered = _CLIENTS * _REQUESTS, done["right"] + done["wrong"]
    first = sorted(done["first"])
    return [
        Figure("requests answered", "", answered, limit=wanted, bar="all", meets=answered == wanted),
        Figure("wrong answers", "", done["wrong"], bar="none", meets=done["wrong"] == 0),
        Figure("times a client was told to come back (429)", "", done["retried"]),
        Figure(f"{_CLIENTS} clients: median time to the first piece", "s", median(first)),
        Figure(f"{_CLIENTS} clients: 99 % of first pieces within", "s", first[int(0.99 * (len(first) - 1))]),
        Figure("owners' bytes after the load, beyond the warm-up", "B", after - before, bar="0", meets=after <= before),
    ]


def _soak_figures(done: dict[str, Any], before: int, after: int) -> list[Figure]:
    broken = sum(done["failed"].values()) + sum(
        count for what, count in done["others"].items() if what.split()[1].startswith("5") or "Error" in what
    )
    return [
        Figure("soak: right answers", "", done["right"]),
        Figure("soak: wrong answers", "", done["wrong"], bar="none", meets=done["wrong"] == 0),
        Figure("soak: vanished, garbage and over limits", "", sum(done["others"].values())),
        Figure("soak: failures of the service", "", broken, bar="none", meets=broken == 0),
        Figure("soak: owners' bytes beyond the warm-up", "B", after - before, bar="0", meets=after <= before),
    ]


def _two_turns(bench: Bench, folder: Path) -> list[Figure]:
    """Time to the first token of turn 2: ours, then the peers of the environment, ``name=url`` separated by commas."""
    with load(folder, device=str(bench.device)) as wb:
        prompts = [text_of(wb, _PROMPT_TOKENS, seed) for seed in range(4 + _CHATS)]
        job: dict[str, Any] = {"prompts": prompts, "new": ["And then?"], "tokens": 8}
        wb.policy = wb.policy.replace(kv={"max_conversations": _CHATS + 1, "prefix_bytes": "2GiB"})
        with serve(wb, port=0) as service:
            bench.say("two turns of SmolLM2: ours")
            ours = _clients("turns", url=service.url, model=None, **job)
    peers = {}
    for peer in filter(None, os.environ.get(_PEERS, "").split(",")):
        name, _, url = peer.partition("=")
        url, _, model = url.partition("#")
        bench.say(f"two turns of SmolLM2: {name}")
        peers[name] = _clients("turns", url=url, model=model or None, **job)
    names = {
        "cold": "turn 2, nothing kept",
        "warm": "turn 2, turn 1 kept",
        "held": f"turn 2, {_CHATS} chats in turn",
    }
    cold = median(ours["cold"])
    figures = []
    for kind, name in names.items():
        own, judged = median(ours[kind]), kind != "cold"
        figures.append(
            Figure(
                f"SmolLM2-135M, {_PROMPT_TOKENS:,} tokens: {name}",
                "s",
                own,
                {peer: median(found[kind]) for peer, found in peers.items()},
                bar=f"<= {_WARM:g} x cold" if judged else "",
                meets=own <= _WARM * cold if judged else None,
            )
        )
    return figures


def _mixed() -> list[dict[str, Any]]:
    """Requests of every kind; the first two are text alone."""
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": text}]} for text in ("Who are you?", "你是谁?")
    ]
    for sample in samples.SAMPLES:
        parts: list[dict[str, Any]] = []
        if sample.image is not None:
            url = f"data:image/png;base64,{_encoded(sample.image)}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        if sample.audio is not None:
            parts.append({"type": "input_audio", "input_audio": {"data": _encoded(sample.audio), "format": "wav"}})
        parts.append({"type": "text", "text": sample.prompt["en"]})
        bodies.append({"messages": [{"role": "user", "content": parts}]})
    return bodies


def _encoded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def _owned(wb: Workbench) -> int:
    """Bytes of everything that has an owner, when nothing is under way."""
    return sum(row.nbytes or 0 for row in wb.memory.on("device") if row.kind in _OWNED)


def _clients(do: str, **job: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "autoglm_lab.bench.service_clients"]
    done = subprocess.run(command, input=json.dumps({"do": do, **job}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
