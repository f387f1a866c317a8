"""Everything the panels show, read once: each panel turns the same `Snapshot` into its own state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from autoglm_lab.engine.protocol import Capabilities, ConversationInfo, Engine, ModuleInfo
from autoglm_lab.engine.remote.engine import RemoteEngine
from autoglm_lab.engine.service_load import ServiceLoad
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.policy import MemoryPolicy


class Samples(Protocol):
    """What the dashboard asks of a sampler."""

    @property
    def latest(self) -> Ledger | None: ...
    def samples(self) -> tuple[Ledger, ...]: ...
    def events(self) -> tuple[Event, ...]: ...
    def on_sample(self, callback: Any) -> None: ...
    def off_sample(self, callback: Any) -> None: ...


class Bench(Protocol):
    """What the dashboard asks of a workbench."""

    policy: MemoryPolicy

    @property
    def engine(self) -> Engine: ...
    @property
    def sampler(self) -> Samples: ...
    @property
    def samplers(self) -> Sequence[Samples]: ...
    def plan(self, policy: MemoryPolicy | None, workload: Workload | None, *, search: bool) -> Plan: ...
    def image_tokens(self, image: tuple[int, int]) -> int | None: ...


@dataclass(frozen=True)
class Snapshot:
    """One moment of a workbench.

    Attributes:
        pages: how keys and values lie in pages; None where this model's cannot, or an engine does not tell.
        page_bytes: of one page, rounding included.
        load: how busy a server is that tells no bytes; None where bytes are told, or nothing is.
        others: ledgers of the model's further devices.
    """

    ledger: Ledger
    policy: MemoryPolicy
    phase: str
    capabilities: Capabilities
    modules: tuple[ModuleInfo, ...]
    conversations: tuple[ConversationInfo, ...]
    events: tuple[Event, ...] = ()
    pages: PageFormat | None = None
    page_bytes: int = 0
    load: ServiceLoad | None = None
    others: tuple[Ledger, ...] = ()

    @property
    def ledgers(self) -> tuple[Ledger, ...]:
        """One for each device."""
        return (self.ledger, *self.others)

    @property
    def absent(self) -> str:
        """The server whose memory cannot be told; empty where it can."""
        return "" if self.capabilities.memory_control else self.capabilities.server

    @property
    def on_gpu(self) -> bool:
        """False where the device is the host."""
        return not self.ledger.device.rpartition(" · ")[2].startswith("CPU")


def take(bench: Bench) -> Snapshot:
    """Read the workbench. Cheap: the ledger is the sampler's latest, not a new reading.

    Raises:
        EngineClosedError: the workbench was closed.
    """
    engine, sampler = bench.engine, bench.sampler
    pages, page_bytes = _pages(engine)
    return Snapshot(
        ledger=sampler.latest or engine.ledger(),
        policy=engine.policy,
        phase=engine.phase,
        capabilities=engine.capabilities,
        modules=engine.modules(),
        conversations=engine.conversations(),
        events=sampler.events(),
        pages=pages,
        page_bytes=page_bytes,
        load=getattr(engine, "load", None),
        others=tuple(one for one in (other.latest for other in bench.samplers[1:]) if one is not None),
    )


def _pages(engine: Engine) -> tuple[PageFormat | None, int]:
    """How keys and values lie in pages: an engine behind an endpoint asks its server."""
    if isinstance(engine, RemoteEngine):
        return engine.pages
    pool = getattr(getattr(engine, "state", None), "pool", None)
    return (None, 0) if pool is None else (pool.form, pool.page_bytes)
