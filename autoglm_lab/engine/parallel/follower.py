"""A rank that follows: it holds its part of the model and of the pages, and runs every step that rank 0 begins.

Started by `parallel.ranks.Ranks` as a program of its own; it ends with rank 0, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from autoglm_lab.engine.parallel import link as say
from autoglm_lab.engine.parallel.collectives import Collectives, LeftError
from autoglm_lab.engine.recovery import is_out_of_memory
from autoglm_lab.engine.step import Stepper
from autoglm_lab.errors import LabError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.kv.paged_sequence import PagedSequence
from autoglm_lab.memory.ledger import LedgerBook, Row
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.models.loading import resolve
from autoglm_lab.models.precision import keep_in
from autoglm_lab.models.rank_model import join, take_share
from autoglm_lab.models.tensor_parallel import FIRST_ONLY
from autoglm_lab.policy import MemoryPolicy

_GRACE = 5.0


class Follower:
    """One rank's part of a model.

    Raises:
        LabError: it cannot be loaded.
    """

    def __init__(self, start: say.Start) -> None:
        if start.device == "cpu":
            torch.set_num_threads(start.threads)
        self._start = start
        self.accelerator = open_accelerator("cpu" if start.device == "cpu" else "cuda:0")
        device = self.accelerator.device
        self.collectives = Collectives(start.meeting, start.rank, start.ranks, device)
        policy = MemoryPolicy.model_validate_json(start.policy)
        resolved = resolve(**start.model, device=device)
        share = take_share(resolved, start.ranks, start.rank)
        keep_in(resolved, policy.precisions())
        modules = {name: {"residency": "off"} for name in FIRST_ONLY if name in _modules(resolved.model)}
        policy = policy.replace(modules=modules)
        self.model: Any = resolved.model
        self.accelerator.set_budget(policy.budget)
        self.residency = Residency(resolved, self.accelerator, policy=policy)
        self.residency.materialise()
        form = PageFormat.of(resolved.config, resolved.dtype, policy.kv.precision)
        assert form is not None  # rank 0 has seen to it
        self.pool = KvPool(form, self.accelerator)
        join(self.model, share, self.collectives)
        self._stepper = Stepper(self.model)
        self._book = LedgerBook(self.accelerator)
        self._book.register(self.residency)
        self._book.register(self)
        self.accelerator.warm_up()

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self.accelerator.notes)

    def holdings(self) -> Iterator[Row]:
        """The pages, whose conversations rank 0 knows by name."""
        if self.pool.backed:
            yield Row("KV pages", "kv", "device", self.pool.backed, "this rank's heads of every conversation's pages")

    def ledger(self) -> Any:
        """Who owns what on this rank's device. From any thread."""
        ledger = self._book.read("idle", self.accelerator.budget)
        return replace(ledger, device=f"{ledger.device} (rank {self._start.rank}, {self._start.device})")

    def do(self, message: Any) -> None:
        """What rank 0 says, one after another."""
        match message:
            case say.Meet():
                with self.accelerator.growth("the group of ranks"):
                    self.collectives.meet(message.round)
            case say.Step():
                self._step(message)
            case say.CopyPage():
                self.pool.back_all([message.page, message.to])
                self.pool.raw(message.to).copy_(self.pool.raw(message.page))
            case say.GiveBackChunks():
                self.pool.give_back(message.chunks)
            case say.Place():
                self._put(message.module, message.at)
            case say.Budget():
                self.accelerator.set_budget(message.nbytes)
            case say.Reclaim():
                self.accelerator.give_back()

    def _step(self, step: say.Step) -> None:
        self.pool.back_all({page for pages in step.pages for page in pages})
        self.residency.ensure([name for name in self.residency if name not in FIRST_ONLY], "a step")
        sequences = []
        for pages, before in zip(step.pages, step.before, strict=True):
            sequence = PagedSequence(self.pool)
            sequence.pages, sequence.tokens = list(pages), before
            sequences.append(sequence)
        if step.fresh:
            self._stepper = Stepper(self.model)
        device = self.accelerator.device
        arguments = {name: _arrived(value, device) for name, value in step.arguments.items()}
        self._stepper.replay(sequences, step.new, arguments)

    def _put(self, name: str, at: str) -> None:
        if name in FIRST_ONLY or name not in self.residency or self.residency[name].at == at:
            return
        if at == "device":
            self.residency.ensure([name], "as on rank 0")
        else:
            self.residency[name].park("host" if at == "host" else "disk", "as on rank 0")

    def close(self) -> None:
        """Give everything back."""
        self.collectives.leave()
        self.pool.close()
        self.residency.close()


def follow(link: say.Link) -> None:
    """Load what the first message says, then do what comes, until the end."""
    start: say.Start = link.receive()
    try:
        follower = Follower(start)
    except Exception as error:  # noqa: BLE001 - rank 0 tells it
        link.send(_failed(error))
        return
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, follower, inbox, start), daemon=True).start()
    link.send(say.Ready(follower.notes))
    trouble: say.Failed | None = None  # with something that is not answered: the next step cannot be right
    while not isinstance(message := inbox.get(), say.End):
        failure = trouble if isinstance(message, say.Step) else None
        failure = failure or _attempt(follower, message)
        if isinstance(message, say.Meet | say.Step):
            if failure is not None:
                follower.collectives.leave()
            link.send(failure or say.Done())
            trouble = None
        elif failure is not None and not isinstance(message, say.Place):
            trouble = failure
    follower.close()


def _listen(link: say.Link, follower: Follower, inbox: queue.SimpleQueue[Any], start: say.Start) -> None:
    """Takes what rank 0 says; what cannot wait for a step is done here."""
    while True:
        try:
            message = link.receive()
        except (EOFError, OSError):
            shutil.rmtree(start.meeting.parent, ignore_errors=True)
            follower.collectives.leave()
            inbox.put(say.End())
            time.sleep(_GRACE)
            os._exit(1)  # a kernel that waits for a rank that is gone never ends
        if isinstance(message, say.ReadLedger):
            with contextlib.suppress(OSError):
                link.send(say.Reading(message.number, follower.ledger()))
            continue
        if isinstance(message, say.Meet):
            follower.collectives.leave()
        inbox.put(message)


def _attempt(follower: Follower, message: Any) -> say.Failed | None:
    try:
        follower.do(message)
    except Exception as error:  # noqa: BLE001 - rank 0 tells it
        return _failed(error)
    return None


def _failed(error: BaseException) -> say.Failed:
    if is_out_of_memory(error):
        return say.Failed("memory", str(error))
    if isinstance(error, LeftError):
        return say.Failed("left", str(error))
    if isinstance(error, LabError):
        return say.Failed("other", str(error))
    traceback.print_exception(error)
    return say.Failed("other", f"a {type(error).__name__}, which is a bug; the log of this program shows where")


def _arrived(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_arrived(one, device) for one in value)
    if isinstance(value, dict):  # what encoders gave, by kind
        pooled = {kind: _arrived(one, device) for kind, one in value.items()}
        return {kind: BaseModelOutputWithPooling(pooler_output=one) for kind, one in pooled.items()}
    return value


def _modules(model: Any) -> set[str]:
    from autoglm_lab.models.anatomy import anatomy

    return {spec.name for spec in anatomy(model)}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to answer
    follow(say.Link(int(sys.argv[1])))
