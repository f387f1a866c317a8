"""The process of another rank: started with one end of a socket, heard on a thread, ended in the end."""

from __future__ import annotations

import itertools
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from autoglm_lab.engine.parallel import link as say
from autoglm_lab.errors import RankError
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.memory.nvml import visible_device

_END_SECONDS = 20.0


class OtherRank:
    """Another rank of a model, as rank 0 holds it. Ended by `end`, or by the end of this process.

    Args:
        start: the first message to it.
        failed: called when it says that something failed, before anyone gets that answer.
        gone: called when it has ended by itself. Both on a thread that listens.
    """

    def __init__(
        self, start: say.Start, failed: Callable[[OtherRank], None], gone: Callable[[OtherRank], None]
    ) -> None:
        self.rank = start.rank
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "autoglm_lab.engine.parallel.follower", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=_environment(start.device)
            )
        self.link = say.Link(ours.detach())
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked: dict[int, Future[Ledger]] = {}
        self._numbers = itertools.count()
        self._failed, self._gone = failed, gone
        self.link.send(start)
        threading.Thread(target=self._listen, name=f"autoglm-lab rank {self.rank}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def answer(self) -> Any:
        """What it answers to what it was told; None: it is gone."""
        return self._answers.get()

    def ask_ledger(self) -> Future[Ledger]:
        number, future = next(self._numbers), Future[Ledger]()
        self._asked[number] = future
        try:
            self.link.send(say.ReadLedger(number))
        except OSError:
            future.set_exception(RankError("it is gone"))
        return future

    def how_it_ended(self) -> str:
        """For people."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "it answers no more"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """Wait for its end, and see to it."""
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.link.close()

    def _listen(self) -> None:
        while True:
            try:
                message = self.link.receive()
            except (EOFError, OSError):
                break
            if isinstance(message, say.Reading):
                self._asked.pop(message.number).set_result(message.ledger)
                continue
            if isinstance(message, say.Failed):
                self._failed(self)
            self._answers.put(message)
        self._gone(self)
        for future in self._asked.values():
            if not future.done():
                future.set_exception(RankError("it is gone"))
        self._answers.put(None)


def _environment(device: str) -> dict[str, str]:
    """It imports what this process imports, wherever that was started, and sees its own GPU alone."""
    given = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if device != "cpu":
        given["CUDA_VISIBLE_DEVICES"] = visible_device(int(device.removeprefix("cuda:")))
    return given
