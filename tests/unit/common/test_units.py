"""Durations, sizes and addresses as people write them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.units import parse_duration_seconds, parse_size_bytes

SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
BYTES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 1000, "MB": 10**6}


@given(st.integers(0, 10**6), st.sampled_from(sorted(SECONDS)))
def test_duration_is_number_times_unit(number: int, unit: str) -> None:
    """For every unit of the contract."""
    assert parse_duration_seconds(f"{number}{unit}") == pytest.approx(number * SECONDS[unit])


@given(st.integers(0, 10**6), st.sampled_from(sorted(BYTES)))
def test_size_is_number_times_unit(number: int, unit: str) -> None:
    """Binary and decimal units, and plain bytes."""
    assert parse_size_bytes(f"{number}{unit}") == number * BYTES[unit]


@given(st.text(max_size=8) | st.from_regex(r"-?[0-9.einfa]{1,8}[a-zA-Z]{0,3}"))
def test_invalid_quantity_raises_value_error(text: str) -> None:
    """Any text parses to a finite number that is not negative, or raises ValueError naming it."""
    for parse in (parse_duration_seconds, parse_size_bytes):
        try:
            value = parse(text)
        except ValueError as error:
            assert repr(text) in str(error)  # noqa: PT017 - either way is right
        else:
            assert 0 <= value < math.inf


@pytest.mark.parametrize("text", ["0", "0s", " 5m ", "1.5h", "0.25ms"])
def test_durations_may_have_fractions_and_zero_needs_no_unit(text: str) -> None:
    """As in `--cache-ttl 0`."""
    assert parse_duration_seconds(text) >= 0


@pytest.mark.parametrize("text", ["1.5", "0.3KiB", "1.0001MiB"])
def test_fraction_of_a_byte_is_rejected(text: str) -> None:
    """Half a byte is a mistake."""
    with pytest.raises(ValueError, match="size"):
        parse_size_bytes(text)
