"""The modules of a workbench as a person handles them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from autoglm_lab.engine.protocol import Engine, ModuleInfo
from autoglm_lab.errors import ModuleError
from autoglm_lab.memory.residency.move import Move
from autoglm_lab.units import format_bytes


@dataclass(frozen=True)
class Module:
    """One module of a workbench."""

    name: str
    _engine: Engine

    @property
    def info(self) -> ModuleInfo:
        return next(info for info in self._engine.modules() if info.name == self.name)

    def park(self, place: Literal["auto", "host", "disk"] = "auto") -> Move:
        """Move it off the device; ``auto``: to pinned host memory beside a GPU, else to disk.

        Beside a GPU this returns at once. What it returns shows as the event that the move ends with; showing it, or
        `Move.result`, waits for the end and raises what went wrong.
        """
        return self._engine.park(self.name, place)

    def wake(self) -> Move:
        """Move it onto the device. Beside a GPU this returns while the weights come: what uses them waits for them."""
        return self._engine.wake(self.name)

    def __repr__(self) -> str:
        info = self.info
        where = info.place if info.place == "moving" else f"on {info.place}"
        return f"{info.name}: {format_bytes(info.nbytes)} {info.dtype}, {where}"


class Modules(Mapping[str, Module]):
    """The modules of a workbench, by name."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getitem__(self, name: str) -> Module:
        if name not in tuple(self):
            raise ModuleError(f"this model has no module {name!r}; its modules are {', '.join(self)}")
        return Module(name, self._engine)

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __iter__(self) -> Iterator[str]:
        return (info.name for info in self._engine.modules())

    def __len__(self) -> int:
        return len(self._engine.modules())

    def __repr__(self) -> str:
        return "\n".join(repr(self[name]) for name in self)
