"""`RemoteWorkbench`: a workbench whose model is behind an endpoint."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from autoglm_lab.engine.messages import image_size
from autoglm_lab.engine.remote.engine import RemoteEngine
from autoglm_lab.engine.remote.feed import RATE, Feed
from autoglm_lab.engine.remote.link import Link
from autoglm_lab.engine.remote.peer import find_peer
from autoglm_lab.engine_bench import EngineBench
from autoglm_lab.errors import EngineClosedError
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.memory.sampler import Sampler
from autoglm_lab.policy import MemoryPolicy

_METRICS_HZ = 1.0


class RemoteWorkbench(EngineBench):
    """A model behind an endpoint, and everything one can do with it from here.

    Of a server of this package that is everything that a `Workbench` can; of another one it is the chat, its figures,
    and what its metrics tell.
    """

    engine: RemoteEngine

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None, timeout: float = 120) -> None:
        link = Link(url, api_key=api_key)
        try:
            peer = find_peer(link, model)
        except BaseException:
            link.close()
            raise
        self.name, self.url = peer.model, link.url
        self._feed: Feed | None = None
        ours = peer.dialect.ours
        newest: list[Ledger] = []
        read = newest.pop if ours else _weakly(self)
        self.sampler = Sampler(read, hz=RATE if ours else _METRICS_HZ)
        self.samplers = (self.sampler,)
        self.engine = RemoteEngine(link, peer, timeout=timeout, record=self.sampler.record)
        if ours:
            engine, sampler = weakref.ref(self.engine), self.sampler

            def take(ledger: Ledger) -> None:
                newest.append(ledger)
                sampler.sample()
                known = engine()
                if known is not None:
                    known.seen(ledger)

            self._feed = Feed(link, take, sampler.record)
            self._feed.start()
            weakref.finalize(self, self._feed.stop)
        else:
            self.sampler.record(Event(time.time(), "note", f"memory: {peer.dialect.name} does not tell of it"))
            self.sampler.start()
            weakref.finalize(self, self.sampler.stop)

    def image_tokens(self, image: Any) -> int | None:
        """How many tokens an image will take of the prompt.

        Args:
            image: as `chat` takes it, or its ``(width, height)``.

        Returns:
            None where the server does not tell.

        Raises:
            MediaError: the image cannot be read.
        """
        return self.engine.image_tokens(image if isinstance(image, tuple) else image_size(image))

    def plan(
        self, policy: MemoryPolicy | None = None, workload: Workload | None = None, *, search: bool = True
    ) -> Plan:
        """What ``workload`` needs on the server's device as it is now.

        Raises:
            ModuleError: the server is not ours, and plans nothing.
        """
        from autoglm_lab.figures.waterfall import waterfall

        return replace(self.engine.plan(policy, workload or Workload(), search=search), drawer=waterfall)

    def close(self) -> None:
        """Let go of the endpoint, which goes on."""
        if self._feed is not None:
            self._feed.stop()
        self.sampler.stop()
        self.engine.close()


def _weakly(bench: RemoteWorkbench) -> Callable[[], Any]:
    """Reads the ledger without keeping the workbench alive."""
    reference = weakref.ref(bench)

    def read() -> Ledger:
        held = reference()
        if held is None:
            raise EngineClosedError("the workbench is gone")
        return held.engine.ledger()

    return read
