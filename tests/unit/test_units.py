from __future__ import annotations

import pytest

from autoglm_lab.units import GiB, KiB, MiB, format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KiB, "1.0 KiB"),
        (MiB, "1.0 MiB"),
        (round(1.66 * GiB), "1.66 GiB"),
        (-3 * MiB, "-3.0 MiB"),
        (None, "n/a"),
    ],
)
def test_bytes_carry_their_unit(nbytes: int | None, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GiB", 24 * GiB), ("512 MB", 512 * 10**6), ("1.5 kib", 1536), ("77", 77), (" 8 b ", 8), (42, 42), (0, 0)],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("nbytes", [1, KiB, 10 * MiB, 3 * GiB])
def test_a_written_size_reads_back(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes)) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "-4GiB", "1e9", "1,5 GiB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read .* as a size; write for example '24GiB'"):
        parse_bytes(text)


def test_a_negative_number_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="a size cannot be negative, got -1"):
        parse_bytes(-1)


@pytest.mark.parametrize("value", [True, None, 2.5, [1]])
def test_another_type_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="a size is an int in bytes or text"):
        parse_bytes(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0.4 ms"), (0.032, "32 ms"), (0.9996, "1.0 s"), (1.42, "1.4 s"), (125, "2 min 5 s")],
)
def test_durations_carry_their_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
