"""``%%vram``: what a cell took at its peak, and what stayed, by owner. ``%load_ext autoglm_lab`` brings it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autoglm_lab.units import MiB, format_bytes

MAGIC = "%%vram"
_OWNED, _SHARED = ("weights", "kv", "owner", "activations"), ("context", "allocator cache")
# Below this a change is the interpreter's own coming and going.
_NOISE = MiB


class VramMagic:
    """Measures the cells that begin with ``%%vram``.

    The first line is taken off before the cell runs, so the cell runs as any other: it may ``await``, and its last
    value is shown. The report is printed after it, also when it fails.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._measure: CellMeasure | None = None

    def register(self) -> None:
        self._shell.input_transformers_cleanup.insert(0, without_magic)
        self._shell.events.register("pre_run_cell", self.begin)
        self._shell.events.register("post_run_cell", self.end)

    def unregister(self) -> None:
        self._shell.input_transformers_cleanup.remove(without_magic)
        self._shell.events.unregister("pre_run_cell", self.begin)
        self._shell.events.unregister("post_run_cell", self.end)

    def begin(self, info: Any) -> None:
        """A cell is about to run."""
        marked = _is_marked(str(info.raw_cell or "").splitlines(keepends=True))
        self._measure = CellMeasure() if marked else None

    def end(self, _result: Any) -> None:
        """A cell has run."""
        measure, self._measure = self._measure, None
        if measure is not None:
            print(measure.report())  # noqa: T201 - into the cell, beside what it printed itself


def without_magic(lines: list[str]) -> list[str]:
    """A cell's lines less its ``%%vram``. IPython calls it with every cell, several times."""
    if not _is_marked(lines):
        return lines
    first = next(index for index, line in enumerate(lines) if line.strip())
    return ["\n" if index == first else line for index, line in enumerate(lines)]


def _is_marked(lines: list[str]) -> bool:
    first = next((line.strip() for line in lines if line.strip()), "")
    return first == MAGIC


@dataclass(frozen=True)
class Holding:
    """Bytes of this process on one device, and of its owners by name."""

    process: int
    owners: dict[str, int]


class CellMeasure:
    """One cell: from when this is made until `report`.

    The device is that of the open workbenches; without one, the GPU where this process uses it, else the host.
    """

    def __init__(self) -> None:
        from autoglm_lab.memory.high_water import high_water

        self._accelerator = _accelerator()
        self._marks = high_water(self._accelerator.device)
        self._before = _holding(self._accelerator)
        self._watch = self._marks.open() if self._marks.available else None

    def report(self) -> str:
        """Lines: the peak over the start, what stayed, and the owners that it stayed with, largest first."""
        now = self._accelerator.reading().process
        peak = None if self._watch is None else self._marks.close(self._watch, now)
        after = _holding(self._accelerator)
        work = "n/a" if peak is None else format_bytes(peak.work)
        what = "tensors" if self._accelerator.kind == "cuda" else "memory"
        lines = [
            f"peak over the start of this cell: {work} of {what}",
            f"stayed: {_change(after.process - self._before.process)}",
            *(f"  {name}: {_change(nbytes)}" for name, nbytes in changes(self._before, after)),
        ]
        return "\n".join(lines)


def changes(before: Holding, after: Holding) -> list[tuple[str, int]]:
    """By how much each owner changed, largest first; what no owner answers for is ``unattributed``."""
    names = [*after.owners, *(name for name in before.owners if name not in after.owners)]
    found = {name: after.owners.get(name, 0) - before.owners.get(name, 0) for name in names}
    found["unattributed"] = after.process - before.process - sum(found.values())
    told = [(name, nbytes) for name, nbytes in found.items() if abs(nbytes) >= _NOISE]
    return sorted(told, key=lambda one: -abs(one[1]))


def _change(nbytes: int) -> str:
    if abs(nbytes) < _NOISE:
        return "less than 1 MiB"
    return f"{'+' if nbytes > 0 else ''}{format_bytes(nbytes)}"


def _benches() -> Iterable[Any]:
    """The open workbenches; none where the package was not used yet."""
    home = sys.modules.get("autoglm_lab.workbench")
    return () if home is None else home.open_workbenches()


def _accelerator() -> Any:
    """That of an open workbench, else one of our own."""
    for bench in _benches():
        return bench.engine.state.accelerator

    import torch

    from autoglm_lab.memory.accelerator import open_accelerator

    return open_accelerator("cuda" if torch.cuda.is_initialized() else "cpu")


def _holding(accelerator: Any) -> Holding:
    """What this process and its owners hold on a device now."""
    from autoglm_lab.memory.ledger import LedgerBook

    if accelerator.kind == "cpu":
        accelerator.give_back()  # what the C library keeps of freed memory has not stayed
    benches = [bench for bench in _benches() if bench.engine.state.accelerator.device == accelerator.device]
    ledgers = {bench.name: bench.memory for bench in benches} or {"": LedgerBook(accelerator).read()}
    owners: dict[str, int] = {}
    for bench, ledger in ledgers.items():
        for row in ledger.on("device"):
            if row.kind in _OWNED:
                name = row.name if len(ledgers) == 1 else f"{bench} {row.name}"
                owners[name] = owners.get(name, 0) + (row.nbytes or 0)
    # The device's own rows are the same in each of them.
    owners |= {row.name: row.nbytes or 0 for row in ledger.on("device") if row.kind in _SHARED}
    return Holding(ledger.process or 0, owners)
