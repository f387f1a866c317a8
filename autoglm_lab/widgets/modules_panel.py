"""The modules and their switches: which stay on the device, which come when they are needed, which are off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from autoglm_lab.engine.protocol import Engine, ModuleInfo
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import Ledger, Row
from autoglm_lab.models.anatomy import anatomy
from autoglm_lab.models.precision import MIXED, made_in, module_nbytes
from autoglm_lab.models.skeleton import skeleton
from autoglm_lab.widgets.palette import colour_key, rank
from autoglm_lab.widgets.panel import Panel
from autoglm_lab.widgets.settings import set_policy
from autoglm_lab.widgets.snapshot import Snapshot


def modules_state(snapshot: Snapshot) -> dict[str, Any]:
    """One entry a module, and the settings that all of them share (None where they differ)."""
    modules = sorted(snapshot.modules, key=lambda module: rank(_row(module)))
    policy, names = snapshot.policy, [module.name for module in modules]
    return {
        "modules": [_module(module, snapshot) for module in modules],
        "park_to": _shared([policy.module(name).park_to for name in names]),
        "keep_alive": _shared([policy.module(name).keep_alive for name in names]),
        "control": snapshot.capabilities.memory_control,
        "host_is_device": not snapshot.on_gpu,
    }


def host_copy(ledger: Ledger, module: str) -> str | None:
    """How a module's copy on the host is kept: ``pinned`` or ``pageable``; None: there is none."""
    for row in ledger.on("host"):
        if row.kind == "weights" and row.name == module and row.nbytes:
            return "pinned" if "pinned" in row.counts else "pageable"
    return None


def trouble(events: Sequence[Event], module: ModuleInfo) -> str:
    """Why the last park of a module failed in the background; empty where it did not, or another move came since."""
    since = module.last_event.time if module.last_event else 0.0
    for event in reversed(events):
        if event.time < since:
            break
        if event.kind == "note" and event.subject == module.name and event.why.startswith("not parked"):
            return event.why
    return ""


def _module(module: ModuleInfo, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "name": module.name,
        "place": module.place,
        "nbytes": module.nbytes,
        "dtype": module.dtype,
        "residency": snapshot.policy.module(module.name).residency,
        "colour": colour_key(_row(module)),
        "copy": host_copy(snapshot.ledger, module.name),
        "note": module.note,
        "trouble": trouble(snapshot.events, module),
        "last": asdict(module.last_event) if module.last_event else None,
    }


def _row(module: ModuleInfo) -> Row:
    return Row(module.name, "weights", "device", module.nbytes)


def _shared(values: list[Any]) -> Any:
    return values[0] if values and all(value == values[0] for value in values) else None


def freed(model: Any, precision: str, held: Mapping[str, int]) -> int:
    """Bytes that loading ``model`` again with its text in ``precision`` would free; negative: it would take.

    Args:
        precision: ``model``, or a name of `precision.MIXED`.
        held: bytes of each module now.
    """
    plain = skeleton(model.config, made_in(model))
    sizes = {spec.name: spec.nbytes for spec in anatomy(plain)}
    for name, kept in MIXED.get(precision, {}).items():
        if name in sizes:
            sizes[name] = module_nbytes(plain, kept)[name]
    return sum(held[name] - sizes[name] for name in ("text", "head") if name in sizes and name in held)


class ModulesPanel(Panel):
    """State, size and last move of every module, and its residency; what another precision would free."""

    name = "modules_panel"
    of_memory = True

    _foretold: tuple[str, int] | None = None

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        kept = snapshot.policy.module("text").precision
        wanted, frees = self._foretold or (kept, 0)
        own = getattr(self.host.bench if self.host else None, "model", None) is not None
        return modules_state(snapshot) | {"precision": kept, "wanted": wanted, "frees": frees, "in_kernel": own}

    def do_precision(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Work out what a precision would free: it is had from the next load on."""
        if self.host is not None:
            bench: Any = self.host.bench
            wanted = str(content["precision"])
            self.run("precision", lambda: self._foretell(bench, wanted))

    def _foretell(self, bench: Any, wanted: str) -> None:
        held = {module.name: module.nbytes for module in bench.engine.modules()}
        self._foretold = wanted, freed(bench.model, wanted, held)

    def do_residency(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        name, residency = str(content["module"]), content["residency"]
        self._change(name, {name: {"residency": residency}})

    def do_park_to(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        self._change("park_to", {name: {"park_to": content["place"]} for name in self._names()})

    def do_keep_alive(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        seconds = float(content["seconds"])
        self._change("keep_alive", {name: {"keep_alive": seconds} for name in self._names()})

    def do_move(self, content: Mapping[str, Any], _buffers: Sequence[memoryview]) -> None:
        """Park a module now, or wake it now; its residency stays as it is.

        Each module has a lane of its own: a move under way holds up neither the settings nor another module.
        """
        if self.host is not None:
            name, park, engine = str(content["module"]), content["to"] == "park", self.host.bench.engine
            self.run(f"move {name}", lambda: _move(engine, name, park=park), lane=f"move {name}")

    def _names(self) -> list[str]:
        return [module["name"] for module in self.state.get("modules", [])]

    def _change(self, key: str, modules: dict[str, Any]) -> None:
        if self.host is not None:
            bench = self.host.bench
            self.run(key, lambda: set_policy(bench, modules=modules))


def _move(engine: Engine, module: str, *, park: bool) -> None:
    """Begin a move and wait for its end, so that what goes wrong in the background shows in the panel."""
    move = engine.park(module) if park else engine.wake(module)
    move.result()
