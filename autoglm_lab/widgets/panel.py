"""The base of every panel: one small anywidget that shows a state and sends what the person does.

The kernel side and the browser side agree on four traits (`state`, `labels`, `busy`, `problem`), written only by the
dashboard's refresher, and on messages ``{"do": name, ...}`` from the browser. Nothing here blocks: handlers run in the
kernel's comm thread, so they only hand work to a `Worker`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import anywidget
import traitlets

from autoglm_lab.errors import LabError
from autoglm_lab.widgets.labels import labels_of
from autoglm_lab.widgets.snapshot import Bench, Snapshot

_HERE = Path(__file__).parent
_SHARED_CSS = (_HERE / "panel.css").read_text(encoding="utf-8")

Handler = Callable[[Mapping[str, Any], Sequence[memoryview]], None]


class Host(Protocol):
    """What a panel asks of the dashboard that holds it."""

    @property
    def bench(self) -> Bench: ...

    @property
    def warning(self) -> dict[str, Any] | None:
        """What the plan says will not fit; None: it fits, or there is no plan yet."""
        ...

    def work(self, panel: Panel, key: str, action: Callable[[], object], *, lane: str = "settings") -> None:
        """Run ``action`` on a worker thread; ``key`` is busy meanwhile, and its error shows in the panel."""
        ...

    def report(self, panel: Panel, problem: str) -> None:
        """Show ``problem`` in the panel; an empty one clears it."""
        ...

    def wake(self) -> None:
        """Refresh soon."""
        ...

    def turn_language(self) -> None:
        """Speak the next language."""
        ...

    def watch(self, views: int) -> None:
        """A view opened (1) or went (-1)."""
        ...


class Panel(anywidget.AnyWidget):
    """One panel.

    Subclasses set ``name`` (of their labels and of their ``.js`` file), ``parts`` (files to put before that one),
    ``of_memory`` (where a server does not tell of its memory, the panel says so instead), `state_of`, and ``do_<name>``
    handlers for the messages of their browser side.

    Attributes:
        state: what the browser shows: a dict of plain values. Default empty.
        labels: the panel's words in the language of the dashboard.
        busy: keys of the actions that are under way.
        problem: an error to show in the panel; empty: none.
    """

    name: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()
    of_memory: ClassVar[bool] = False

    state = traitlets.Dict().tag(sync=True)
    labels = traitlets.Dict().tag(sync=True)
    busy = traitlets.List(traitlets.Unicode()).tag(sync=True)
    problem = traitlets.Unicode("").tag(sync=True)
    comm_id = traitlets.Unicode("").tag(sync=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # traitlets derives a class of its own for each widget: only the panels themselves name a file.
        if "name" in cls.__dict__:
            files = ("panel", *cls.parts, cls.name)
            cls._esm = "\n".join((_HERE / f"{file}.js").read_text(encoding="utf-8") for file in files)
            cls._css = _SHARED_CSS
        super().__init_subclass__(**kwargs)

    def __init__(self, host: Host | None = None, *, lang: str = "en", **traits: Any) -> None:
        """Make a panel for a dashboard.

        Raises:
            TypeError: a keyword that is not a trait of the panel; the message lists them.
        """
        known = set(self.class_trait_names(sync=True)) - {"state", "labels", "busy", "problem", "comm_id"}
        known = {name for name in known if not name.startswith("_")}
        if unknown := sorted(set(traits) - known):
            raise TypeError(
                f"{type(self).__name__} has no {', '.join(map(repr, unknown))}; it has {', '.join(sorted(known))}"
            )
        self.host = host
        super().__init__(labels=labels_of(self.name, lang), **traits)
        self.comm_id = self.model_id
        self.on_msg(self._receive)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of a dashboard"

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        """What the panel shows of a snapshot. Called by the refresher alone."""
        raise NotImplementedError

    def absent_of(self, snapshot: Snapshot) -> dict[str, Any]:
        """What a panel of memory shows where a server tells of none: whose it is, and labels to fill in beside it."""
        return {"absent": snapshot.absent, "facts": []}

    def show(self, snapshot: Snapshot, busy: Sequence[str], problem: str) -> None:
        """Push what changed, and only that. Called by the refresher alone."""
        away = self.of_memory and snapshot.absent
        self._put("state", self.absent_of(snapshot) if away else self.state_of(snapshot))
        self._put("busy", list(busy))
        self._put("problem", problem)

    def speak(self, lang: str) -> None:
        """Change the language. Called by the refresher alone."""
        self._put("labels", labels_of(self.name, lang))

    def _put(self, trait: str, value: object) -> None:
        if getattr(self, trait) != value:
            setattr(self, trait, value)

    def _receive(self, _widget: object, content: Mapping[str, Any], buffers: Sequence[memoryview]) -> None:
        if self.host is None:
            return
        do = content.get("do") if isinstance(content, Mapping) else None
        handler: Handler | None = getattr(self, f"do_{do}", None)
        if handler is None:
            self.host.report(self, f"this panel does not know {do!r}")
            return
        try:
            handler(content, buffers)
        except Exception as error:  # noqa: BLE001 -- whatever a handler raises is shown where the person clicked
            self.host.report(self, message_of(error))

    def do_dismiss(self, _content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Close the error that is shown."""
        if self.host is not None:
            self.host.report(self, "")

    def run(self, key: str, action: Callable[[], object], *, lane: str = "settings") -> None:
        """Hand ``action`` to a worker thread of the dashboard; actions of one lane run one after another."""
        if self.host is not None:
            self.host.work(self, key, action, lane=lane)


def message_of(error: BaseException) -> str:
    """An error for people: our own say it all, others need their type."""
    return str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}"
