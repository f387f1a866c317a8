"""Cards to pretend to have: what a program can really use of one, which is less than what is printed on its box."""

from __future__ import annotations

from autoglm_lab.units import GiB

USABLE: dict[int, int] = {
    8: round(7.75 * GiB),
    12: round(11.75 * GiB),
    16: round(15.6 * GiB),
    24: round(23.6 * GiB),
}
"""Bytes that CUDA offers, by the nominal size in GiB: the least that torch's own messages name in public reports of
such cards under Linux (RTX 4060, RTX 3060, RTX A4000, RTX 3090 and 4090), rounded down. The context still comes off."""


def card_budget(gib: int) -> int:
    """The budget that stands for a card of a nominal size: ``wb.policy.replace(budget=card_budget(8))``.

    Args:
        gib: 8, 12, 16 or 24.

    Raises:
        ValueError: another size.
    """
    if gib not in USABLE:
        raise ValueError(
            f"cards of {', '.join(map(str, USABLE))} GiB are known, not of {gib}: give the budget in bytes"
        )
    return USABLE[gib]
