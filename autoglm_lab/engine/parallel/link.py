"""What rank 0 and another rank say to one another, over a socket that only they have.

Steps are plain values and tensors of the CPU; the bytes are pickled, since both ends are one program of one user.
"""

from __future__ import annotations

import pickle
import socket
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from autoglm_lab.memory.ledger import Ledger

# from rank 0


@dataclass(frozen=True)
class Start:
    """The first message: which model, and which part of it. Answered by `Ready` or `Failed`.

    Attributes:
        model: what `models.loading.resolve` is asked for, by argument.
        policy: every setting, as JSON.
        device: as rank 0 calls it; a rank sees no other GPU than its own.
        meeting: the file that the ranks find each other through.
        threads: of torch, where there is no GPU.
    """

    model: dict[str, Any]
    policy: str
    device: str
    rank: int
    ranks: int
    meeting: Path
    threads: int


@dataclass(frozen=True)
class Meet:
    """Form a group anew; what waits in the one before is given up. Answered by `Done` or `Failed`."""

    round: int


@dataclass(frozen=True)
class Step:
    """A forward. Answered by `Done` or `Failed`.

    Attributes:
        pages: of each conversation, those for the new tokens included.
        before: tokens that each holds.
        new: tokens that each reads.
        arguments: of the model, with tensors on the CPU.
        fresh: rank 0 tries its stand-ins for some layers anew in it, so everyone does.
    """

    pages: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]
    new: int
    arguments: dict[str, Any]
    fresh: bool


@dataclass(frozen=True)
class CopyPage:
    """The contents of a page go to another one."""

    page: int
    to: int


@dataclass(frozen=True)
class GiveBackChunks:
    """Chunks of pages that nobody uses go back to the system."""

    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A module of rank 0 is at ``at`` now: ``device``, ``host`` or ``disk``."""

    module: str
    at: str


@dataclass(frozen=True)
class Budget:
    """Bytes that each rank may use on its device."""

    nbytes: int | None


@dataclass(frozen=True)
class Reclaim:
    """Give back what is cached."""


@dataclass(frozen=True)
class ReadLedger:
    """Answered by a `Reading` of the same number, also while a step is under way."""

    number: int


@dataclass(frozen=True)
class End:
    """Free everything and end."""


# to rank 0


@dataclass(frozen=True)
class Ready:
    """The weights are there.

    Attributes:
        notes: what a person should know, one sentence each.
    """

    notes: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """What was asked has been done."""


@dataclass(frozen=True)
class Failed:
    """What was asked could not be done.

    Attributes:
        cause: ``memory``: there was none; ``left``: another rank gave up; ``other``.
        text: what happened.
    """

    cause: str
    text: str


@dataclass(frozen=True)
class Reading:
    """A ledger."""

    number: int
    ledger: Ledger


class Link:
    """One end of the connection. Any thread may send; one receives."""

    def __init__(self, handle: int) -> None:
        self._connection = Connection(handle)
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Raises:
        OSError: the other end is gone.
        """
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._connection.send_bytes(data)

    def receive(self) -> Any:
        """The next message, when it comes.

        Raises:
            EOFError, OSError: the other end is gone.
        """
        return pickle.loads(self._connection.recv_bytes())  # noqa: S301 - of a process that rank 0 has started

    def close(self) -> None:
        """End the connection; who receives on the other end gets `EOFError`. Again is no harm."""
        if not self._connection.closed:
            # Closing a descriptor does not wake a thread of this process that reads from it.
            with socket.socket(fileno=self._connection.fileno()) as wire:
                try:
                    wire.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                finally:
                    wire.detach()
