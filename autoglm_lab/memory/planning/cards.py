"""Cards to pretend to have: what a program can really use of one, which is less than what is printed on its box."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Card:
    """A card by name.

    Attributes:
        usable: bytes that CUDA offers, before the context comes off.
    """

    name: str
    usable: int


CARDS: dict[str, Card] = {
    name: Card(name, round(gib * GiB))
    for name, gib in {
        "T4": 14.5,
        "V100 16GB": 15.7,
        "V100 32GB": 31.7,
        "RTX 2080 Ti": 10.7,
        "RTX 3060 12GB": 11.75,
        "RTX 3080 10GB": 9.75,
        "RTX 3090": 23.6,
        "RTX 4060 8GB": 7.75,
        "RTX 4060 Ti 16GB": 15.6,
        "RTX 4070 12GB": 11.75,
        "RTX 4080": 15.6,
        "RTX 4090": 23.6,
        "RTX 5090": 31.3,
        "RTX A4000": 15.6,
        "RTX A6000": 47.4,
        "A10G": 22.0,
        "L4": 22.0,
        "L40S": 44.3,
        "A100 40GB": 39.3,
        "A100 80GB": 79.1,
        "H100 80GB": 79.1,
        "H200": 139.7,
    }.items()
}
"""Cards by name. Their bytes are the least that torch's messages name in public reports under Linux, rounded down;
only the H200 was measured here."""


def find_card(name: str) -> Card | None:
    """The card of that name, however it is spelled: ``rtx4090``, ``NVIDIA GeForce RTX 4090``; None: there is none."""
    wanted = _spelling(name)
    for card in sorted(CARDS.values(), key=lambda card: -len(card.name)):
        if _spelling(card.name) == wanted:
            return card
    return None


def _spelling(name: str) -> str:
    words = name.lower().replace("-", " ").replace("nvidia", "").replace("geforce", "").replace("gib", "gb")
    return "".join(words.split())
