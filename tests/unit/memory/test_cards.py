from __future__ import annotations

import pytest

from autoglm_lab.memory.planning.cards import USABLE, card_budget
from autoglm_lab.units import GiB


def test_a_card_offers_less_than_its_nominal_size() -> None:
    assert all(0.95 * size * GiB < card_budget(size) < size * GiB for size in USABLE)


def test_an_unknown_size_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="cards of 8, 12, 16, 24 GiB are known, not of 11: give the budget in bytes"):
        card_budget(11)
