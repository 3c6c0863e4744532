"""Bytes, times and counts in three digits."""

import pytest

from jaxft.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_seconds,
    format_storage,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (2**26, "64 MiB"), (5e11, "466 GiB")],
)
def test_bytes_of_memory_are_shown_in_three_digits(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (78_500, "78.5 kB"), (2**20, "1.05 MB"), (5e11, "500 GB"),
     (1.2e13, "12,000 GB")],
)  # fmt: skip
def test_bytes_of_disks_have_the_units_of_disks(count, text):
    assert format_storage(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (2.5e-9, "2.5 ns"), (5e-6, "5.00 µs"), (0.0000123456, "12.3 µs"),
     (0.0364, "36.4 ms"), (0.0987654, "98.8 ms"), (1.23456, "1.23 s"), (123.4, "123 s"),
     (98765, "98,765 s")],
)  # fmt: skip
def test_seconds_have_three_digits_and_a_unit(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1:00"),
     (3599.7, "1:00:00"), (3723, "1:02:03")],
)  # fmt: skip
def test_durations_are_short(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999_999, "999,999"), (1_234_567, "1.23 M"), (8.03e9, "8.03 B"), (2e12, "2 T")],
)
def test_counts_get_a_letter_from_a_million_on(count, text):
    assert format_count(count) == text
