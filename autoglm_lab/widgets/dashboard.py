"""`Dashboard`: a workbench with widgets. It holds the panels, keeps them up to date, and runs what they set off."""

from __future__ import annotations

import secrets
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets  # type: ignore[import-untyped]

from autoglm_lab.errors import EngineClosedError
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.widgets import still
from autoglm_lab.widgets.budget_panel import BudgetPanel
from autoglm_lab.widgets.chat_panel import ChatPanel
from autoglm_lab.widgets.device_bar import DeviceBar
from autoglm_lab.widgets.events_panel import EventsPanel
from autoglm_lab.widgets.export_panel import ExportPanel
from autoglm_lab.widgets.header import Header
from autoglm_lab.widgets.kv_panel import KvPanel
from autoglm_lab.widgets.labels import LANGS, labels_of
from autoglm_lab.widgets.live_plot import LivePlot
from autoglm_lab.widgets.modules_panel import ModulesPanel
from autoglm_lab.widgets.panel import Panel, message_of
from autoglm_lab.widgets.plan_panel import PlanPanel
from autoglm_lab.widgets.refresher import Refresher
from autoglm_lab.widgets.snapshot import Bench, Snapshot, take
from autoglm_lab.widgets.training_panel import TrainingPanel
from autoglm_lab.widgets.transcript import transcript_of
from autoglm_lab.widgets.worker import Worker

STATE_SECONDS = 0.25
"""Between two refreshes of the panels' state."""
BEAT_SECONDS = 3.0
"""Between two signs of life to the browser."""
IDLE_SECONDS = 2.0
"""Between two looks while no one watches."""


class Dashboard:
    """The panels of one workbench, for a notebook cell or a Voila page.

    Several may be open at once, and each may be shown several times.

    Args:
        bench: the workbench.
        lang: ``en`` or ``zh``; the header changes it too.

    Raises:
        ValueError: another language.
    """

    def __init__(self, bench: Bench, lang: str = "en") -> None:
        labels_of("header", lang)
        self.lang = lang
        self._strong: Bench | None = bench
        self._weak = weakref.ref(bench)
        self._views = 0
        self._spoken = lang
        self._problems: dict[str, str] = {}
        self._state_at = self._beat_at = 0.0
        self._closing = self._closed = False
        self._last: Snapshot | None = None
        self.header = Header(self, lang=lang)
        self._samplers = tuple(bench.samplers)
        cards = range(len(self._samplers))
        self.device_bars = tuple(DeviceBar(self, lang=lang, card=card) for card in cards)
        self.modules = ModulesPanel(self, lang=lang)
        self.kv = KvPanel(self, lang=lang)
        self.budget = BudgetPanel(self, lang=lang)
        self.plan = PlanPanel(self, lang=lang)
        self.training = TrainingPanel(self, lang=lang)
        self.live_plots = tuple(LivePlot(self, lang=lang, card=card) for card in cards)
        self.chat = ChatPanel(self, lang=lang)
        self.events = EventsPanel(self, lang=lang)
        self.export = ExportPanel(self, lang=lang)
        self.header.still = secrets.token_hex(4)
        self.widget = _arrange(
            wide=[self.header, *self.device_bars, self.plan],
            left=[self.modules, self.kv, self.budget, self.export],
            right=[*self.live_plots, self.chat, self.training, self.events],
        )
        self._worker: Worker[str] = Worker(self._soon, lambda name, error: self._note(name, message_of(error)))
        self._refresher = Refresher(self._tick)
        for sampler in self._samplers:
            sampler.on_sample(self._on_sample)
        transcript_of(bench).follow(bench.engine, self.wake)
        self._refresh(bench)
        self._refresher.start()

    @property
    def bench(self) -> Bench:
        """The workbench. While no one watches, the dashboard does not keep it alive.

        Raises:
            EngineClosedError: it was closed, or nothing else holds it any more.
        """
        bench = self._weak()
        if bench is None or self._closed:
            raise EngineClosedError("this workbench was closed: load the model again")
        return bench

    @property
    def panels(self) -> tuple[Panel, ...]:
        return (
            self.header,
            *self.device_bars,
            self.plan,
            self.modules,
            self.kv,
            self.budget,
            self.training,
            *self.live_plots,
            self.chat,
            self.events,
            self.export,
        )

    def close(self) -> None:
        """Stop refreshing. The workbench stays; the panels show that they are closed."""
        self._closing = True
        self.wake()
        self._refresher.join()

    # what the panels ask of their host

    def work(self, panel: Panel, key: str, action: Callable[[], object], *, lane: str = "settings") -> None:
        """Run ``action`` on a worker thread; its error shows in the panel."""
        self._problems.pop(panel.name, None)
        self._worker.work(panel.name, key, action, lane)

    def report(self, panel: Panel, problem: str) -> None:
        """Show ``problem`` in the panel; an empty one clears it."""
        self._note(panel.name, problem)

    def wake(self) -> None:
        """Refresh soon."""
        self._refresher.wake()

    @property
    def warning(self) -> dict[str, Any] | None:
        """What the plan says will not fit; None: it fits, or there is no plan yet."""
        return self.plan.warning

    def turn_language(self) -> None:
        """Speak the next language."""
        self.lang = LANGS[(LANGS.index(self.lang) + 1) % len(LANGS)] if self.lang in LANGS else "en"
        self._state_at = 0.0
        self.wake()

    def watch(self, views: int) -> None:
        """A view opened (1) or went (-1)."""
        self._views = max(0, self._views + views)
        self._strong = self._weak() if self._views else None
        self._beat_at = self._state_at = 0.0
        self.wake()

    # the refresher's thread

    def _tick(self) -> float | None:
        bench = self._weak()
        if bench is None or self._closing or getattr(bench.engine, "closed", False):
            self._end()
            return None
        if not self._views:
            transcript_of(bench).settle()
            return IDLE_SECONDS
        try:
            return self._refresh(bench)
        except EngineClosedError:
            self._end()
            return None
        except Exception as error:  # noqa: BLE001 -- the thread must go on; the header says what went wrong
            self.header.problem = message_of(error)
            return IDLE_SECONDS

    def _refresh(self, bench: Bench) -> float:
        now = time.monotonic()
        if now - self._state_at >= STATE_SECONDS - 0.01 or self._last is None:
            self._state_at = now
            self._show(bench)
        answering = self.chat.push()
        if now - self._beat_at >= BEAT_SECONDS and self._views:
            self._beat_at = now
            self.header.beat()
        return 0.05 if answering else STATE_SECONDS

    def _show(self, bench: Bench) -> None:
        self._last = snapshot = take(bench)
        self.header.rate = getattr(bench.engine, "tokens_per_second", None)
        if self._spoken != self.lang:
            self._spoken = self.lang
            for panel in self.panels:
                panel.speak(self.lang)
        for panel in self.panels:
            panel.show(snapshot, self._worker.busy(panel.name), self._problems.get(panel.name, ""))
        if self._views and not snapshot.absent:
            for plot, sampler in zip(self.live_plots, self._samplers, strict=True):
                plot.push(snapshot, sampler.samples)

    def _end(self) -> None:
        bench = self._weak()
        if bench is not None:
            for sampler in self._samplers:
                sampler.off_sample(self._on_sample)
            if not self._closed:
                transcript_of(bench).leave(bench.engine, self.wake)
        self._closed, self._strong = True, None
        self._worker.close()
        self.header.state = self.header.state | {"closed": True}

    def _on_sample(self, ledger: Ledger) -> None:
        if self._views:
            self.live_plots[ledger.card].add(ledger)

    def _soon(self) -> None:
        self._state_at = 0.0
        self.wake()

    def _note(self, name: str, problem: str) -> None:
        self._problems[name] = problem
        self._soon()

    # how it shows

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return {
            "text/plain": repr(self),
            "text/html": self._still(),
            "application/vnd.jupyter.widget-view+json": {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.widget.model_id,
            },
        }

    def _ipython_display_(self) -> None:
        """Show the live dashboard, and beside it the picture that stands in for it where no kernel runs."""
        from IPython.display import display

        bundle = self._repr_mimebundle_()
        page = bundle.pop("text/html")
        display(bundle, raw=True)  # type: ignore[no-untyped-call]
        display({"text/html": page, "text/plain": ""}, raw=True)  # type: ignore[no-untyped-call]

    def _still(self) -> str:
        bench = self._weak()
        if not self._closed and bench is not None:
            self._last = take(bench)
        return still.page(self._last, self.header.still) if self._last else ""

    def __repr__(self) -> str:
        return still.plain(self._last) if self._last else "Dashboard"


def _arrange(wide: Sequence[Panel], left: Sequence[Panel], right: Sequence[Panel]) -> Any:
    """Wide panels on top, then two columns, which the stylesheet folds into one where there is little room."""

    def column(panels: Sequence[Panel]) -> Any:
        box = ipywidgets.Box(list(panels))
        box.add_class("algm-column")
        return box

    for panel in wide:
        panel.add_class("algm-wide")
    grid = ipywidgets.Box([*wide, column(left), column(right)])
    grid.add_class("algm-grid")
    whole = ipywidgets.Box([grid])
    whole.add_class("algm-dashboard")
    return whole
