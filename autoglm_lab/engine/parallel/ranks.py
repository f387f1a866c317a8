"""Rank 0's side of a model that several processes hold together: it starts the others, leads their steps, ends them.

Every step is told first and computed then, by all at once. A rank that fails says so, and the group is formed anew: the
step fails on every rank, and the next one can go on. A rank that ends takes the model with it, and is told at once.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as LateError
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoglm_lab.engine.lean_forward import LeanForward
from autoglm_lab.engine.parallel import link as say
from autoglm_lab.engine.parallel.collectives import Collectives, LeftError
from autoglm_lab.engine.parallel.limits import refuse_apart
from autoglm_lab.engine.parallel.other_rank import OtherRank
from autoglm_lab.errors import LoadError, OutOfMemoryError, RankError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.kv.paged_cache import PagedCache
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.memory.residency.module_residency import ModuleResidency
from autoglm_lab.models.loading import Resolved
from autoglm_lab.models.rank_model import join
from autoglm_lab.models.tensor_parallel import FIRST_ONLY, Share
from autoglm_lab.policy import MemoryPolicy

_LEDGER_SECONDS = 30.0
_MOVED = ("parked", "woke")


class Ranks:
    """The other ranks of a model, as rank 0 sees them. Only the engine's thread leads steps.

    Args:
        model: what `models.loading.resolve` is asked for, by argument.
        accelerator: of rank 0; the others take the devices after it.

    Attributes:
        collectives: what all ranks compute together.
        on_lost: called with a sentence when a rank has ended by itself, on a thread of its own.

    Raises:
        LoadError: there are not so many devices.
    """

    def __init__(self, ranks: int, accelerator: Accelerator, *, model: dict[str, Any], policy: str) -> None:
        self.count, self._accelerator = ranks, accelerator
        self.on_lost: Callable[[str], None] = lambda _: None
        self._lost: str | None = None
        self._residency: Mapping[str, ModuleResidency] | None = None
        self._closing = False
        self._rounds = itertools.count()
        devices = _devices(accelerator.device, ranks)
        self._folder = Path(tempfile.mkdtemp(prefix="autoglm-lab-ranks-"))
        meeting = self._folder / "meeting"
        self.collectives = Collectives(meeting, 0, ranks, accelerator.device)
        self._others: list[OtherRank] = []
        try:
            for rank in range(1, ranks):
                start = say.Start(model, policy, devices[rank], rank, ranks, meeting, torch.get_num_threads())
                self._others.append(OtherRank(start, self._left_by, self._gone))
        except BaseException:
            self.close()
            raise

    @property
    def lost(self) -> str | None:
        """Which rank has ended by itself, and how; None: all are there."""
        return self._lost

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes of the other ranks."""
        return tuple(other.pid for other in self._others)

    def moving(self, record: Callable[[Event], None]) -> Callable[[Event], None]:
        """``record`` for the events of rank 0's modules, which the other ranks' modules follow."""

        def tell(event: Event) -> None:
            record(event)
            known = self._residency
            if known is not None and event.kind in _MOVED and event.subject not in FIRST_ONLY:
                self._tell(say.Place(event.subject, known[event.subject].at))

        return tell

    def begin(self, residency: Mapping[str, ModuleResidency]) -> tuple[str, ...]:
        """Wait until every rank has its weights, and form the group.

        Args:
            residency: rank 0's modules.

        Returns:
            What a person should know of them, one sentence each.

        Raises:
            LoadError: one of them could not load its part; the message says which, and why.
        """
        self._residency, notes = residency, list[str]()
        for other in self._others:
            answer = other.answer()
            if isinstance(answer, say.Failed):
                raise LoadError(f"rank {other.rank} could not load its part: {answer.text}")
            if answer is None:
                raise LoadError(f"{self._lost}, while it loaded its part")
            notes += [f"rank {other.rank}: {note}" for note in answer.notes]
        self._meet()
        return tuple(notes)

    @contextlib.contextmanager
    def step(self, cache: Any, arguments: dict[str, Any], lean: LeanForward) -> Iterator[None]:
        """Let the others run the forward that is computed meanwhile.

        Raises:
            RankError: a rank is gone, or failed.
            OutOfMemoryError: a rank had no memory for it.
        """
        self._check()
        if not isinstance(cache, PagedCache):
            raise RankError("several ranks keep keys and values in pages, which this model's layers do not take")
        pages = tuple(tuple(sequence.pages) for sequence in cache.sequences)
        step = say.Step(pages, tuple(cache.before), cache.new_tokens, _told(arguments), fresh=not lean.tried)
        self._say(step)
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # noqa: BLE001 - raised again below, once the others have answered
            error = caught
        if error is not None:
            self.collectives.leave()  # who waits for this rank gives up
        answers = [other.answer() for other in self._others]
        if error is None and all(isinstance(answer, say.Done) for answer in answers):
            return
        lean.forget()
        self._check(error)
        self._meet()
        if error is not None and not isinstance(error, LeftError):
            raise error
        raise _first_cause(answers) from None

    # what the pages do

    def copied(self, page: int, own: int) -> None:
        """A page was copied."""
        self._tell(say.CopyPage(page, own))

    def gave_back(self, chunks: Sequence[int]) -> None:
        """Chunks of unused pages were given back."""
        self._tell(say.GiveBackChunks(tuple(chunks)))

    # what memory does

    def set_budget(self, nbytes: int | None) -> None:
        """Let every rank use so many bytes of its device."""
        self._say(say.Budget(nbytes))

    def reclaim(self) -> None:
        """Let every rank give back what it caches."""
        self._tell(say.Reclaim())

    def ledgers(self) -> tuple[Ledger, ...]:
        """Who owns what on the other ranks' devices; those that do not answer are left out. From any thread."""
        asked = [other.ask_ledger() for other in self._others if self._lost is None]
        found = []
        for future in asked:
            with contextlib.suppress(LateError, RankError):
                found.append(future.result(_LEDGER_SECONDS))
        return tuple(found)

    def close(self) -> None:
        """End every rank. Again is no harm."""
        if self._closing:
            return
        self._closing = True
        for other in self._others:
            with contextlib.suppress(OSError):
                other.link.send(say.End())
        self.collectives.leave()
        for other in self._others:
            other.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _meet(self) -> None:
        number = next(self._rounds)
        self._say(say.Meet(number))
        with self._accelerator.growth("the group of ranks"):
            try:
                self.collectives.meet(number)
            except LeftError as error:
                self._check(error)
                raise RankError(f"the ranks could not form a group: {error}") from None
        answers = [other.answer() for other in self._others]
        self._check()
        if not all(isinstance(answer, say.Done) for answer in answers):
            raise _first_cause(answers)

    def _say(self, message: Any) -> None:
        """Tell the others. Raises `RankError` where one of them is gone."""
        self._tell(message)
        self._check()

    def _tell(self, message: Any) -> None:
        """The same; who is gone is known at the next step."""
        for other in self._others:
            if self._lost is not None or self._closing:
                return
            try:
                other.link.send(message)
            except OSError:
                self._gone(other)

    def _check(self, error: BaseException | None = None) -> None:
        if self._lost is not None and not self._closing:
            raise RankError(f"{self._lost}: its part of the model is gone. Load the model again") from error

    # on the threads that listen

    def _left_by(self, _: OtherRank) -> None:
        """A rank has failed: what this one waits for will not come."""
        self.collectives.leave()

    def _gone(self, other: OtherRank) -> None:
        if self._closing or self._lost is not None:
            return
        self._lost = f"rank {other.rank} of {self.count} has ended ({other.how_it_ended()})"
        self.collectives.leave()
        for one in self._others:
            one.link.close()
        self.on_lost(self._lost)


def start_ranks(
    resolved: Resolved, share: Share, policy: MemoryPolicy, accelerator: Accelerator, model: dict[str, Any]
) -> Ranks:
    """Start the other ranks of a model whose share this process is about to load, and join its layers to theirs.

    Args:
        model: what `models.loading.resolve` was asked for, by argument.

    Raises:
        PolicyError: the policy asks for what several ranks cannot do.
        LoadError: there are not so many devices, or the model keeps more than keys and values in pages.
    """
    refuse_apart(policy)
    if PageFormat.of(resolved.config, resolved.dtype, policy.kv.precision) is None:
        raise LoadError(
            f"{resolved.name} has layers that slide or keep a state, whose cache several ranks cannot share: leave "
            "tensor_parallel out"
        )
    ranks = Ranks(share.ranks, accelerator, model=model, policy=policy.model_dump_json())
    join(resolved.model, share, ranks.collectives)
    resolved.notes += (share.note,) if share.note else ()
    return ranks


def _devices(first: torch.device, ranks: int) -> list[str]:
    """A device for each rank, from rank 0's on."""
    if first.type == "cpu":
        return ["cpu"] * ranks
    begin, there = first.index or 0, torch.cuda.device_count()
    if begin + ranks > there:
        raise LoadError(
            f"tensor_parallel={ranks} from {first} on needs {begin + ranks} GPUs, and torch sees {there} here"
        )
    return [f"cuda:{begin + rank}" for rank in range(ranks)]


def _told(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: _on_host(value) for name, value in arguments.items()}


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):  # what encoders gave, by kind
        return {kind: _pooled(dict.__getitem__(value, kind).pooler_output) for kind in value}
    return value


def _pooled(features: Any) -> Any:
    if isinstance(features, Tensor):
        return features.cpu().clone()
    return tuple(part.cpu().clone() for part in features)


def _first_cause(answers: Iterable[Any]) -> Exception:
    failures = [(rank, one) for rank, one in enumerate(answers, start=1) if isinstance(one, say.Failed)]
    failures.sort(key=lambda one: one[1].cause == "left")
    rank, failure = failures[0]
    if failure.cause == "memory":
        return OutOfMemoryError(f"a step of rank {rank}", None, None, [f"free memory on its device ({failure.text})"])
    return RankError(f"rank {rank} failed in a step: {failure.text}")
