"""What plans said and what was measured: kept between runs in a small file, to tell how right plans are here.

One line of JSON an answer, in the user's cache folder. Nothing here raises: a file that cannot be read or written is as
good as none.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from autoglm_lab.units import GiB

MOST_LINES = 500
"""Lines that the file keeps; the oldest go first."""
_MOST_GROWN = 2 * GiB
"""No driver was seen to take half of it; more is a misreading."""
_LATEST = 20


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One answer. Bytes throughout.

    Attributes:
        time: seconds since 1970.
        predicted, measured: the most that the process held, by phase.
        context, grown, workspaces: what the device took for itself by then; see `device_constants.PlanDevice`.
    """

    time: float
    model: str
    dtype: str
    device: str
    predicted: Mapping[str, int]
    measured: Mapping[str, int]
    context: int = 0
    grown: int = 0
    workspaces: int = 0

    @property
    def error(self) -> float | None:
        """By how much the largest phase was predicted too high (positive) or too low, as a share of it."""
        both = self.predicted.keys() & self.measured.keys()
        if not both or not all(self.measured[phase] > 0 for phase in both):
            return None
        most = max(self.measured[phase] for phase in both)
        return max(self.predicted[phase] for phase in both) / most - 1


@dataclass(frozen=True, slots=True)
class PlanErrors:
    """How far off plans were: shares of the largest phase; ``median`` of the absolute ones."""

    last: float
    median: float
    count: int


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a device took for itself in earlier runs, in bytes, by the latest answers: the middle one for the context,
    the most for what comes with use.
    """

    context: int
    grown: int
    workspaces: int


def cache_folder() -> Path:
    """The user's cache folder of this package, as the platform has it. It need not exist."""
    stated = os.environ.get("XDG_CACHE_HOME", "")
    if stated and Path(stated).is_absolute():
        return Path(stated) / "autoglm-lab"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "autoglm-lab"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "autoglm-lab" / "Cache"
    return Path.home() / ".cache" / "autoglm-lab"


class PlanRecord:
    """The entries of this machine. From any thread.

    Args:
        file: None: ``plans.jsonl`` in `cache_folder`.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file, self._lock = file, threading.Lock()

    def add(self, entry: PlanEntry) -> None:
        """Write an entry, and drop the oldest where there are too many."""
        with self._lock, contextlib.suppress(OSError, ValueError, RuntimeError):
            file = self._path()
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as open_file:
                open_file.write(json.dumps(asdict(entry)) + "\n")
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            if len(lines) > MOST_LINES:
                shorter = file.with_suffix(f".{os.getpid()}")
                shorter.write_text("".join(lines[-MOST_LINES:]), encoding="utf-8")
                shorter.replace(file)

    def entries(self, device: str, model: str | None = None, dtype: str | None = None) -> tuple[PlanEntry, ...]:
        """Those of a device, and of a model where one is named, oldest first; broken lines are left out."""
        with self._lock:
            try:
                lines = self._path().read_text(encoding="utf-8", errors="replace").splitlines()
            except (OSError, ValueError, RuntimeError):
                return ()
        found = [entry for entry in map(_read, lines[-MOST_LINES:]) if entry is not None and entry.device == device]
        return tuple(one for one in found if model in (None, one.model) and dtype in (None, one.dtype))

    def errors(self, device: str, model: str, dtype: str) -> PlanErrors | None:
        """How far off the plans for a model were; None: none was measured."""
        told = [entry.error for entry in self.entries(device, model, dtype)]
        errors = [error for error in told if error is not None]
        if not errors:
            return None
        return PlanErrors(errors[-1], median(map(abs, errors[-_LATEST:])), len(errors))

    def learnt(self, device: str) -> Learnt | None:
        """What the device took for itself; None: nothing is known of it."""
        sound = (entry for entry in self.entries(device) if entry.context > 0 and entry.grown <= _MOST_GROWN)
        latest = list(sound)[-_LATEST:]
        if not latest:
            return None
        context = round(median(entry.context for entry in latest))
        return Learnt(context, max(entry.grown for entry in latest), max(entry.workspaces for entry in latest))

    def _path(self) -> Path:
        return cache_folder() / "plans.jsonl" if self._file is None else self._file


def _read(line: str) -> PlanEntry | None:
    try:
        entry = PlanEntry(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return entry if _sound(entry) else None


def _sound(entry: PlanEntry) -> bool:
    def counted(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    tables: tuple[Any, ...] = (entry.predicted, entry.measured)
    return (
        all(isinstance(text, str) for text in (entry.model, entry.dtype, entry.device))
        and all(isinstance(table, dict) and all(map(counted, table.values())) for table in tables)
        and all(map(counted, (entry.context, entry.grown, entry.workspaces)))
    )
