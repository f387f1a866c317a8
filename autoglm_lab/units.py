"""Bytes and times as people read them. Code counts bytes as ints; text always carries the unit."""

from __future__ import annotations

import re

KiB = 1024
MiB = 1024**2
GiB = 1024**3

_UNITS = {
    "b": 1,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": 1024**4,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*$")


def format_bytes(nbytes: int | None) -> str:
    """Bytes for people: ``1.66 GiB``, ``3.4 MiB``, ``512 B``; ``n/a`` where a figure is not available."""
    if nbytes is None:
        return "n/a"
    size = abs(nbytes)
    sign = "-" if nbytes < 0 else ""
    if size >= GiB:
        return f"{sign}{size / GiB:.2f} GiB"
    if size >= MiB:
        return f"{sign}{size / MiB:.1f} MiB"
    if size >= KiB:
        return f"{sign}{size / KiB:.1f} KiB"
    return f"{sign}{size} B"


def exact_bytes(nbytes: int) -> str | int:
    """Bytes in the largest unit that says them exactly: ``8GiB``, ``1536MiB``; a number where none does."""
    for unit, size in (("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if nbytes and nbytes % size == 0:
            return f"{nbytes // size}{unit}"
    return nbytes


def parse_bytes(text: str | int) -> int:
    """Bytes from ``"24GiB"``, ``"512 MB"`` or an int.

    Raises:
        ValueError: the text is not a number with a known unit, or is negative.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError(f"a size is an int in bytes or text such as '24GiB', not {text!r}")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size cannot be negative, got {text}")
        return text
    match = _SIZE.match(text)
    unit = match and (match.group(2).lower() or "b")
    if match is None or unit not in _UNITS:
        raise ValueError(f"cannot read {text!r} as a size; write for example '24GiB', '800 MiB' or a number of bytes")
    return round(float(match.group(1)) * _UNITS[unit])


def format_seconds(seconds: float) -> str:
    """A duration for people: ``32 ms``, ``1.4 s``, ``2 min 5 s``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
