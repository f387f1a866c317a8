"""Admission: what a turn will need is asked of the plan before it is tried, and what cannot fit is refused.

What was not recorded of the model yet is recorded on a thread beside the engine, while no answer is under way; until
then turns are let in. See `memory.planning.planner`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from autoglm_lab.engine.conversation import Conversation
from autoglm_lab.engine.prompt import Prompt
from autoglm_lab.engine.request_estimate import Estimate, Request, estimate, remedies
from autoglm_lab.engine.state import EngineState
from autoglm_lab.errors import AdmissionError
from autoglm_lab.memory.kv.eviction import chunk_within
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS
from autoglm_lab.memory.planning.device_constants import measured
from autoglm_lab.memory.planning.encoder_tapes import Medium, MediumInputs
from autoglm_lab.memory.planning.plan_record import PlanEntry, PlanErrors, PlanRecord
from autoglm_lab.memory.planning.plan_search import changes
from autoglm_lab.memory.planning.planner import Planner, planner
from autoglm_lab.memory.planning.step_work import RequestCost, UntracedError
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.loading import Outline
from autoglm_lab.models.precision import convert, made_in, precisions_of
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.schedule import prefill_chunks
from autoglm_lab.units import GiB

DOUBT = 0.01
"""Share of the limit by which a plan may be too high: within it a turn is tried."""
_NEAR = 0.1
_PATIENCE, _NAP = 2.0, 0.05
_AMPLE = 4
_MOST_WAITING = 4


class Admission:
    """Lets turns in, or refuses them; only the engine's thread asks it, but for `price` and `errors`.

    Args:
        name, dtype: of the model, as plans name them.
        record: where predictions are kept beside what was measured.
    """

    def __init__(self, state: EngineState, name: str, dtype: torch.dtype, record: PlanRecord | None = None) -> None:
        self._state, self._name, self._dtype = state, name, dtype
        self._record = PlanRecord() if record is None else record
        self._planner: Planner | None = None
        self._promised: dict[str, int] = {}
        self._precisions: dict[str, str] = {}
        self._near: MemoryPolicy | None = None
        self._jobs: deque[Callable[[], None]] = deque(maxlen=_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._gate, self._closing = threading.Lock(), threading.Event()

    def check(
        self, conversation: Conversation, prompt: Prompt, start: int, new_tokens: int, *, force: bool = False
    ) -> Estimate | None:
        """Ask whether a turn fits.

        Args:
            conversation: whose turn it is; what it holds already counts.
            start: tokens of the prompt that need no reading.
            new_tokens: most tokens of the answer.
            force: do not refuse.

        Returns:
            What it will need; None where that is not known yet, or there is so much room that nobody asks.

        Raises:
            AdmissionError: it cannot fit, whatever the policy lets the engine free.
        """
        request = self._request(conversation, prompt, start, new_tokens)
        cost = self._known(request)
        if cost is None:
            return None
        found = estimate(self._state, request, cost, self._driver)
        if found.missing > -_NEAR * self._limit:
            self._learn_remedies(request)
        if not force and found.missing > DOUBT * self._limit:
            raise AdmissionError(found.phase, found.needed, found.had, self._remedies(request, found))
        if conversation.kv.paged is not None:
            self._promised[conversation.name] = cost.kv
        return found

    def price(self, prompt_tokens: int, new_tokens: int, *, conversations: int = 1) -> tuple[int, int] | None:
        """Bytes of the device that one more request of so many tokens adds, media not counted. From any thread.

        Args:
            conversations: that answer together, this one included.

        Returns:
            What stays until it ends (keys and values), and the most that comes and goes on top of all requests while
            one of them is read or decoded; None where that is not known yet.
        """
        chunks = prefill_chunks(0, prompt_tokens, self._state.policy.kv.chunk)
        request = Request("", prompt_tokens, prompt_tokens + new_tokens, tuple(chunks), conversations)
        try:
            cost = self._cost(request, self._state.policy, None)
        except UntracedError:
            self._later(lambda: self._learn(request))
            return None
        work = cost.work
        return cost.kv + work.own_cache, max(work.prefill.reserved, work.decode.reserved) + work.graphs

    def ended(self, conversation: str, predicted: Estimate | None, peaks: dict[str, int]) -> None:
        """A turn is over: keep what was predicted beside what was measured, where both are known."""
        self._promised.pop(conversation, None)
        if predicted is None or not predicted.peaks or not peaks or predicted.others:
            return
        accelerator = self._state.accelerator
        spaces = sum(row.nbytes or 0 for row in accelerator.holdings() if row.name == "workspaces")
        entry = PlanEntry(
            time=time.time(),
            model=self._name,
            dtype=_name(self._dtype),
            device=accelerator.name,
            predicted={phase: nbytes for phase, nbytes in predicted.peaks.items() if phase in peaks},
            measured={phase: nbytes for phase, nbytes in peaks.items() if phase in predicted.peaks},
            context=accelerator.context,
            grown=max(0, accelerator.grown.nbytes),
            workspaces=spaces,
        )
        self._later(lambda: self._record.add(entry))

    def errors(self) -> PlanErrors | None:
        """How far off the plans for this model were on this device. From any thread; it reads a file."""
        return self._record.errors(self._state.accelerator.name, self._name, _name(self._dtype))

    def ahead(self, plans: Iterator[Callable[[], object]]) -> None:
        """Make plans beside the engine, one by one while it rests: who asks for them later waits for no trace. From any
        thread.
        """

        def step() -> None:
            plan = next(plans, None)
            if plan is not None:
                self._wait_for_rest()
                plan()
                self._later(step)

        self._later(step)

    def settle(self) -> None:
        """Wait until what was put off is done."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """Put nothing off any more."""
        self._closing.set()
        with self._gate:
            self._jobs.clear()

    # what is asked

    def _request(self, conversation: Conversation, prompt: Prompt, start: int, new_tokens: int) -> Request:
        state = self._state
        kv, encoder = state.policy.kv, state.stepper.encoder
        kept = len(prompt.ids) + new_tokens
        limit = state.kv_limit()
        chunk = kv.chunk
        length = len(prompt.ids)
        if limit is not None and conversation.kv.forgets:
            kept, length = min(kept, limit), min(length, limit)
            chunk = chunk_within(kv, limit, len(prompt.ids))
        whole = [] if encoder.separate(prompt, start) else [(run.start, run.start + run.length) for run in prompt.runs]
        media, needs = [], set()
        for run in encoder.missing_runs(prompt, start):
            inputs = prompt.inputs_of(run)
            medium: Medium = "vision" if run.kind == "image" else "audio"
            needs.add(medium)
            media += [MediumInputs(medium, inputs)] * bool(inputs)
        return Request(
            conversation=conversation.name,
            prompt=length,
            kept=kept,
            chunks=tuple(
                (max(0, first - max(0, last - length)), min(last, length))
                for first, last in prefill_chunks(start, len(prompt.ids), chunk, prompt.blocks, whole)
            ),
            batch=max(1, sum(other.busy for other in state.conversations)),
            held=conversation.kv.nbytes,
            needs=frozenset(needs),
            media=tuple(media),
            promised=self._outstanding(conversation.name),
        )

    def _known(self, request: Request) -> RequestCost | None:
        """What a turn costs, as far as it can be told now; a batch that was never recorded counts as one alone."""
        policy, known = self._state.policy, None
        for batch in dict.fromkeys((request.batch, 1)):
            with contextlib.suppress(UntracedError):
                known = self._cost(replace(request, batch=batch), policy, None)
                if batch == request.batch:
                    return known
                break
        if self._matters(request):
            self._later(lambda: self._learn(request))
        return known

    def _outstanding(self, own: str) -> int:
        """Bytes of keys and values that turns under way will still take."""
        held = {one.name: one.kv.nbytes for one in self._state.conversations if one.busy and one.name != own}
        self._promised = {name: nbytes for name, nbytes in self._promised.items() if name in held}
        return sum(max(0, nbytes - held[name]) for name, nbytes in self._promised.items())

    def _cost(self, request: Request, policy: MemoryPolicy, before_trace: Callable[[], None] | None) -> RequestCost:
        predict, precisions = self._planner, self._state.policy.precisions()
        if predict is None or self._precisions != precisions:
            if before_trace is None:
                raise UntracedError
            predict = self._planner = self._made()
            self._precisions = precisions
        allowed = policy.kv.max_tokens
        kept = request.kept if allowed is None else min(request.kept, max(allowed, request.prompt))
        chunks = request.chunks
        if policy.kv.chunk != self._state.policy.kv.chunk and chunks:
            chunks = tuple(prefill_chunks(chunks[0][0], chunks[-1][1], policy.kv.chunk))
        return predict.request(
            policy,
            prompt=request.prompt,
            kept=kept,
            chunks=chunks,
            batch=request.batch,
            media=request.media,
            before_trace=before_trace,
        )

    def _made(self) -> Planner:
        state = self._state
        processor = state.processor
        model = skeleton(state.model.config, made_in(state.model))
        convert(model, precisions_of(state.model))
        shapes = Outline(self._name, model, self._dtype, lambda: processor)
        return planner(shapes, measured(state.accelerator))

    def _remedies(self, request: Request, found: Estimate) -> list[str]:
        if self._planner is None:
            return []
        return remedies(self._state, self._planner, request, found, lambda policy: self._cost(request, policy, None))

    @property
    def _driver(self) -> int:
        return 0 if self._planner is None else self._planner.device.working

    @property
    def _limit(self) -> int:
        budget = self._state.policy.budget
        return self._state.accelerator.total if budget is None else budget

    def _matters(self, request: Request) -> bool:
        """Whether it is worth recording the model: not where the host has room for several times the tokens."""
        state = self._state
        if state.accelerator.kind == "cuda" or state.policy.budget is not None:
            return True
        page = 0 if state.pool is None else state.pool.page_bytes
        return state.accelerator.headroom() < _AMPLE * (-(-request.kept // PAGE_TOKENS) * page + GiB)

    # beside the engine

    def _learn(self, request: Request) -> None:
        self._cost(request, self._state.policy, self._wait_for_rest)

    def _learn_remedies(self, request: Request) -> None:
        """Record, once for a policy, what other settings would need: a turn may be refused soon."""
        policy, predict = self._state.policy, self._planner
        if predict is None or policy == self._near:
            return
        self._near = policy

        def learn() -> None:
            for change in changes(predict, policy, Workload(max(1, request.prompt))):
                self._cost(request, policy.replace(**change.settings), self._wait_for_rest)

        self._later(learn)

    def _wait_for_rest(self) -> None:
        """Let the answer under way end first, within reason: the interpreter runs one thread at a time.

        Raises:
            UntracedError: the engine is closed, or Python ends, which waits for this thread.
        """
        deadline = time.monotonic() + _PATIENCE
        while self._state.phase != "idle" and time.monotonic() < deadline and not self._closing.is_set():
            self._closing.wait(_NAP)
        if self._closing.is_set() or not threading.main_thread().is_alive():
            raise UntracedError

    def _later(self, job: Callable[[], None]) -> None:
        with self._gate:
            if self._closing.is_set():
                return
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="autoglm-lab plan")
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._gate:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            try:
                job()
            except UntracedError:  # the engine is closed meanwhile
                continue
            except Exception as error:  # noqa: BLE001 - any model's own code runs here, and no turn waits for it
                self._state.event("note", "plan", why=f"could not be learnt: {type(error).__name__}: {error}")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
