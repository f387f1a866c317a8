"""Which benches there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from autoglm_lab.errors import LabError

if TYPE_CHECKING:
    from autoglm_lab.bench.bench import Bench
    from autoglm_lab.bench.report import Report

CATALOG: dict[str, str] = {
    "load": "a folder of safetensors brought to the device",
    "swap": "a module parked and woken",
    "prefill": "reading a prompt: time, and the peak over the weights",
    "kv": "decoding, and keys and values in fewer bytes",
    "precision": "decoding with weights in 8 and 4 bits, and what the process takes",
    "quality": "what lossy settings cost",
    "evict": "forgetting by attention, beside forgetting by age",
    "plan": "plans against what is measured, a process a row, and budgets that they say fit or do not",
    "budgets": "a phone agent's step under budgets of 24 to 8 GiB, each row in a process of its own",
    "turns": "a new turn on what is kept of a conversation",
    "trace": "20 steps of a phone agent",
    "layers": "decoding with parts of the layers on the host",
    "devices": "one model on two GPUs",
    "parallel": "one model over several devices that compute every layer together, beside one",
    "train": "one step of fine-tuning: peak over weights and adapters, and time",
    "ledger": "the ledger against the driver's own count, and what sampling costs",
    "serve": "the service under load: many clients, beside one",
    "soak": "300 random requests under a budget",
}
"""What each bench measures, by name; its code is ``bench/<name>.py``."""


def chosen(names: list[str]) -> tuple[str, ...]:
    """The benches to run; ``all`` stands for every one.

    Raises:
        LabError: there is none of that name.
    """
    unknown = [name for name in names if name not in CATALOG and name != "all"]
    if unknown:
        raise LabError(f"there is no bench {unknown[0]!r}: use {', '.join(CATALOG)}, or all")
    return tuple(CATALOG) if "all" in names else tuple(dict.fromkeys(names))


def runner(name: str) -> Callable[[Bench], Report]:
    """The function that runs a bench."""
    module = importlib.import_module(f"autoglm_lab.bench.{name}")
    return cast("Callable[[Bench], Report]", module.run)
