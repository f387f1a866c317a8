"""Which colour an owner has, in the bar, the plot and the static picture alike.

The browser side knows the same keys as CSS variables (`panel.css`), which have a light and a dark value; the static
picture uses `STILL`, which reads on both.
"""

from __future__ import annotations

from autoglm_lab.memory.ledger import Row

STILL = {
    "text": "#4269d0",
    "vision": "#efb118",
    "audio": "#ff725c",
    "projector": "#ff8ab7",
    "head": "#97bbf5",
    "extra-1": "#3ca951",
    "extra-2": "#9c6b4e",
    "extra-3": "#38b2c8",
    "extra-4": "#c98bdb",
    "kv": "#6cc5b0",
    "kv-2": "#4aa893",
    "activations": "#a463f2",
    "cache": "#b4bcc6",
    "context": "#8b97a5",
    "driver": "#737f8c",
    "other": "#a39b8b",
    "unattributed": "#c0564b",
    "free": "#e6e9ed",
}
"""Colour keys and the value each has in the static picture."""

_KINDS = {
    "activations": "activations",
    "allocator cache": "cache",
    "context": "context",
    "driver reserved": "driver",
    "other processes": "other",
    "unattributed": "unattributed",
    "free": "free",
}
_MODULES = ("text", "head", "vision", "audio", "projector")
_EXTRAS = ("extra-1", "extra-2", "extra-3", "extra-4")

_KIND_ORDER = (
    "weights",
    "owner",
    "kv",
    "activations",
    "context",
    "allocator cache",
    "unattributed",
    "driver reserved",
    "other processes",
    "free",
)

MODEL_KINDS = frozenset({"weights", "kv", "owner", "activations"})
"""Rows that the model itself needs."""
OUTSIDE_KINDS = frozenset({"driver reserved", "other processes", "free"})
"""Rows on the device that are not this process."""


def colour_key(row: Row) -> str:
    """The colour of one row. The same name has the same colour in every ledger, whatever else is in it."""
    if row.kind in _KINDS:
        return _KINDS[row.kind]
    if row.kind == "kv":
        return "kv-2" if sum(row.name.encode()) % 2 else "kv"
    name = row.name.lower().partition("@")[0]
    if name in _MODULES:
        return name
    if "projector" in name:
        return "projector"
    if "head" in name or "embed" in name:
        return "head"
    return _EXTRAS[sum(name.encode()) % len(_EXTRAS)]


def rank(row: Row) -> tuple[int, int]:
    """Where a row stands in the bar and in the plot: from the model outwards, the largest and steadiest part first."""
    place = ("model", "process", "device").index(scope(row))
    key = colour_key(row)
    if row.kind == "weights" and key in _MODULES:
        return place, _MODULES.index(key)
    return place, len(_MODULES) + _KIND_ORDER.index(row.kind)


def scope(row: Row) -> str:
    """How far one has to zoom out to see a row: ``model``, ``process`` or ``device``."""
    if row.kind in MODEL_KINDS:
        return "model"
    return "device" if row.kind in OUTSIDE_KINDS else "process"
