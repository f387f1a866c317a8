"""`ServerMemory`: the memory and the settings of a server of ours, asked over its endpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeVar, cast

from autoglm_lab.engine.policy_difference import difference
from autoglm_lab.engine.protocol import ConversationInfo, ModuleInfo
from autoglm_lab.engine.remote.link import Link, in_path
from autoglm_lab.engine.wire import from_wire, to_wire
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.memory.planning.plan import Plan
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.policy import MemoryPolicy

Result = TypeVar("Result")
FRESH_SECONDS: Final = 0.4
"""How old what a server said may be when it is shown again."""
_KEPT = 64


class Recent:
    """What was read a moment ago, by name: panels ask for the same several times a second."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, Any]] = {}

    def get(self, key: str, read: Callable[[], Result]) -> Result:
        """What was read at most `FRESH_SECONDS` ago, or is read now."""
        at, value = self._known.get(key, (0.0, None))
        if not at or time.monotonic() - at > FRESH_SECONDS:
            value = read()
            self._known[key] = (time.monotonic(), value)
        return cast("Result", value)

    def forget(self) -> None:
        self._known.clear()


class ServerMemory:
    """Asks one server of ours. Whatever it refuses is raised as the error that it was there."""

    def __init__(self, link: Link, recent: Recent) -> None:
        self._link, self._recent = link, recent
        self._images: dict[tuple[tuple[int, int], int | None], int | None] = {}

    def policy(self) -> MemoryPolicy:
        return self._get("policy", MemoryPolicy)

    def modules(self) -> tuple[ModuleInfo, ...]:
        return self._get("modules", tuple[ModuleInfo, ...])

    def conversations(self) -> tuple[ConversationInfo, ...]:
        return self._get("conversations", tuple[ConversationInfo, ...])

    def pages(self) -> tuple[PageFormat | None, int]:
        """How keys and values lie in pages, and the bytes of one; None and 0: they do not, or it is not told."""
        told = self._recent.get("capabilities", lambda: self._link.ask("GET", "/v1/memory/capabilities"))
        form = told.get("pages")
        return (None, 0) if form is None else (from_wire(PageFormat, form), int(told.get("page_bytes") or 0))

    def image_tokens(self, size: tuple[int, int]) -> int | None:
        """Tokens of an image of ``(width, height)`` under the policy as it is; None: not told."""
        key = (size, self.policy().max_image_tokens)
        if key not in self._images:
            told = self._link.look(f"/v1/memory/image-tokens?width={size[0]}&height={size[1]}")
            if not isinstance(told, Mapping):
                return None
            self._images = {**dict(list(self._images.items())[-_KEPT:]), key: told.get("tokens")}
        return self._images[key]

    def ledger(self) -> Ledger:
        return from_wire(Ledger, self._link.ask("GET", "/v1/memory"))

    def set_policy(self, policy: MemoryPolicy) -> None:
        changes = difference(self.policy(), policy)
        if changes:
            self._change("PATCH", "policy", changes)

    def park(self, module: str, place: Literal["auto", "host", "disk"]) -> Move:
        """Waits for the end, as `wake` does."""
        return self._moved(f"modules/{in_path(module)}/park", {"place": place})

    def wake(self, module: str) -> Move:
        return self._moved(f"modules/{in_path(module)}/wake", None)

    def reclaim(self) -> Event:
        return from_wire(Event, self._change("POST", "reclaim", None))

    def drop(self, conversation: str) -> None:
        self._change("DELETE", f"conversations/{in_path(conversation)}", None)

    def plan(self, policy: MemoryPolicy | None, workload: Workload, *, search: bool) -> Plan:
        wanted = None if policy is None else to_wire(difference(self.policy(), policy))
        body = {"policy": wanted, "workload": to_wire(workload), "search": search}
        return from_wire(Plan, self._link.ask("POST", "/v1/memory/plan", body))

    def _get(self, name: str, kind: type[Result]) -> Result:
        return self._recent.get(name, lambda: from_wire(kind, self._link.ask("GET", f"/v1/memory/{name}")))

    def _moved(self, path: str, body: Any) -> Move:
        return Move.ended(from_wire(Event, self._change("POST", path, body)))

    def _change(self, method: str, path: str, body: Any) -> Any:
        try:
            return self._link.ask(method, f"/v1/memory/{path}", body)
        finally:
            self._recent.forget()
