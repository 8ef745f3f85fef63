"""Sizes and durations as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.units import format_age, format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("5 MiB", 5 * 2**20), ("900KiB", 900 * 1024), ("1.5 gib", 3 * 2**29), ("17 B", 17), ("0", 0)],
)
def test_sizes(text: str, size: int) -> None:
    """A number with a unit, in any case, with or without a space."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250 ms", 0.25), ("30s", 30.0), ("5 min", 300.0), ("2 h", 7200.0), ("7 d", 604800.0), ("0", 0.0)],
)
def test_durations(text: str, seconds: float) -> None:
    """From milliseconds to days."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "5", "5 parsecs", "-5 s", "1e3 s", "5 s s", "٣ s "])
def test_what_is_neither(text: str) -> None:
    """Anything else is refused with an example."""
    for parse in (parse_size, parse_duration):
        with pytest.raises(ValueError, match="such as"):
            parse(text)


@given(st.integers(0, 2**50))
def test_sizes_are_written_as_they_are_read(size: int) -> None:
    """What is printed means the same."""
    assert parse_size(format_size(size)) == size


@given(st.integers(0, 10**9))
def test_durations_are_written_as_they_are_read(milliseconds: int) -> None:
    """What is printed means the same, to the millisecond."""
    assert parse_duration(format_duration(milliseconds / 1000)) == milliseconds / 1000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.96, "10.0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (7384, "2 h 3 min"),
        (93784, "1 d 2 h"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    """A length of time is told by its one or two largest units."""
    assert format_age(seconds) == text
