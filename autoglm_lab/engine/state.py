"""What one local engine works with: model, memory and conversations. Only the engine's thread changes it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autoglm_lab.engine.conversation import Conversations
from autoglm_lab.engine.decode_graphs import DecodeGraphs
from autoglm_lab.engine.positions import Positions
from autoglm_lab.engine.step import Stepper
from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event, EventKind
from autoglm_lab.memory.kv.feature_store import FeatureStore
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS
from autoglm_lab.memory.ledger import Row
from autoglm_lab.memory.peak import PeakMeter, PhasePeaks
from autoglm_lab.memory.reclaim import Reclaimer
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.memory.sampler import Sampler
from autoglm_lab.policy import MemoryPolicy

if TYPE_CHECKING:
    from autoglm_lab.engine.admission import Admission
    from autoglm_lab.engine.parallel.ranks import Ranks


@dataclass
class EngineState:
    """The parts of a local engine.

    Attributes:
        accelerators: the model's devices; a prompt comes to the first.
        pool: the pages of keys and values; None where this model's layers cannot be paged.
        features: what the encoders gave for images and sounds, by content.
        context_tokens: the longest dialogue the model takes; None: not stated.
        phase: what the engine is doing.
        peaks: where the peaks of the phase under way go.
        in_use: the modules that the step under way needs.
        tokens_per_second: decoding speed of the last turn that decoded.
        admission: says before a turn whether it fits; None: every turn is tried.
        ranks: other processes that hold parts of the model; None: there are none.
        meanwhile: called again and again while the device computes and the engine's thread would only wait.
    """

    model: Any
    processor: Any
    residency: Residency
    accelerators: tuple[Accelerator, ...]
    reclaimer: Reclaimer
    samplers: tuple[Sampler, ...]
    meter: PeakMeter
    stepper: Stepper
    policy: MemoryPolicy
    conversations: Conversations
    pool: KvPool | None = None
    features: FeatureStore = field(default_factory=FeatureStore)
    context_tokens: int | None = None
    phase: str = "idle"
    peaks: tuple[PhasePeaks, ...] = ()
    in_use: frozenset[str] = frozenset()
    tokens_per_second: float | None = None
    admission: Admission | None = None
    ranks: Ranks | None = None
    meanwhile: Callable[[], None] = lambda: None

    @property
    def accelerator(self) -> Accelerator:
        """The device that a prompt comes to; the only one, most often."""
        return self.accelerators[0]

    @property
    def sampler(self) -> Sampler:
        """That of the first device; it has the events."""
        return self.samplers[0]

    @property
    def tightest(self) -> Accelerator:
        """The device that has the least room."""
        return min(self.accelerators, key=lambda accelerator: accelerator.headroom())

    @contextlib.contextmanager
    def growth(self, what: str, times: int | None = None) -> Iterator[None]:
        """Count what the driver takes meanwhile, on every device. See `Accelerator.growth`."""
        with contextlib.ExitStack() as open_:
            for accelerator in self.accelerators:
                open_.enter_context(accelerator.growth(what, times))
            yield

    def set_budget(self, nbytes: int | None) -> None:
        """Cap what the process may use on each device; None: no cap that we set."""
        for accelerator in self.accelerators:
            if nbytes is not None or accelerator.budget is not None:
                accelerator.set_budget(nbytes)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def enter(self, phase: str, *peaks: PhasePeaks) -> None:
        """Begin a phase; its peak is written to ``peaks`` when the next one begins."""
        self.phase, self.peaks = phase, peaks
        self.meter.enter(None if phase == "idle" else phase, peaks)

    def event(
        self, kind: EventKind, subject: str, *, nbytes: int | None = None, seconds: float | None = None, why: str = ""
    ) -> Event:
        """Record an event that has just happened."""
        return self.event_of(Event(time.time(), kind, subject, nbytes, seconds, why))

    def event_of(self, event: Event) -> Event:
        self.sampler.record(event)
        return event

    def kv_limit(self) -> int | None:
        """Most tokens of one conversation that the policy allows; None: as many as the model takes."""
        kv = self.policy.kv
        limits = [] if kv.max_tokens is None else [kv.max_tokens]
        if kv.max_bytes is not None and self.pool is not None:
            limits.append(kv.max_bytes // self.pool.page_bytes * PAGE_TOKENS)
        return min(limits, default=None)

    def prepare_steps(self) -> None:
        """Make what runs the steps, for the pages and the policy as they are now."""
        old = self.stepper
        if old.graphs is not None:
            old.graphs.clear()
        graphs = None
        alone = self.ranks is None and self.pool is not None and len(self.pool.shares) == 1
        if self.pool is not None and alone and self.accelerator.kind == "cuda" and self.policy.kv.graphs:
            graphs = DecodeGraphs(
                self.model,
                self.pool,
                planes=Positions(self.model).planes,
                context_tokens=self.context_tokens,
                before=None if self.residency.on_host is None else self.residency.on_host.settle,
                meanwhile=self._serve,
                told=self._note_graph,
                growth=self.accelerator.growth,
                warm_up=self.accelerator.warm_up,
            )
        self.stepper = Stepper(
            self.model,
            encoder=old.encoder,
            graphs=graphs,
            ranks=self.ranks,
            told=lambda text: self._note("prompts", text),
        )

    def limit_stores(self) -> None:
        """Let what is kept between turns obey the policy as it is now."""
        self.features.obey(self.policy.kv.encoder_bytes)
        if self.pool is not None:
            self.pool.prefixes.obey(self.policy.kv)

    def free_stores(self) -> None:
        """Free what is kept on the device between turns, and that no conversation holds."""
        self.features.clear()
        if self.pool is not None:
            self.pool.prefixes.free()

    def warm_up(self) -> None:
        """What the first step would wait for; on the thread that runs the steps."""
        for accelerator in self.accelerators:
            accelerator.warm_up()
        if self.stepper.graphs is not None:
            self.stepper.graphs.wait_for_kernels()

    def _serve(self) -> None:
        self.meanwhile()

    def _note(self, subject: str, text: str) -> None:
        self.event("note", subject, why=text)

    def _note_graph(self, text: str, seconds: float) -> None:
        self.event("note", "decode graphs", seconds=seconds, why=text)

    def holdings(self) -> Iterable[Row]:
        """Rows of what the steps keep on the device."""
        yield from self.features.holdings()
        if self.stepper.graphs is not None:
            yield from self.stepper.graphs.holdings()

    def reclaim(self, why: str) -> Event:
        """Give unused memory back to the system, KV pages too; recorded."""
        start, trimmed = time.perf_counter(), self.pool.trim() if self.pool is not None else 0
        if self.ranks is not None:
            self.ranks.reclaim()
        event = self.reclaimer.reclaim(why, clear_traceback=self.policy.reclaim.traceback)
        seconds, nbytes = time.perf_counter() - start, (event.nbytes or 0) + trimmed
        return self.event_of(replace(event, nbytes=nbytes, seconds=seconds))

    def check_budget(self) -> None:
        """Raises:
        OutOfMemoryError: the process is over the policy's budget.
        """
        if self.policy.budget is None:
            return
        headroom = self.tightest.headroom()
        if headroom < 0:
            raise OutOfMemoryError(self.phase, -headroom, 0)
