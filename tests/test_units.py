from __future__ import annotations

import math

import pytest

from bminf.errors import ArgumentError
from bminf.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, 0),
        (7, 7),
        (7.9, 7),
        ("7", 7),
        ("6GB", 6_000_000_000),
        ("6 gb", 6_000_000_000),
        ("5.5GiB", 5_905_580_032),
        (" .5 KiB ", 512),
        ("1e3MB", 10**9),
        ("2TiB", 2 * 2**40),
    ],
)
def test_sizes_as_people_write_them(given: int | float | str, expected: int) -> None:
    assert parse_bytes(given) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (-1, "at least 0"),
        ("-1GB", "not a size"),
        (math.nan, "at least 0"),
        (10**400, "at most"),
        (math.inf, "at least 0"),
        ("6 parsecs", "unknown unit 'parsecs'"),
        ("", "not a size"),
        ("GB", "not a size"),
        (True, "bool"),
        (None, "NoneType"),
        ([1], "list"),
    ],
)
def test_what_is_not_a_size_is_refused_by_name(given: object, said: str) -> None:
    with pytest.raises(ArgumentError, match=f"memory_limit=.*{said}"):
        parse_bytes(given, "memory_limit")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB"), (2**41, "2.00 TiB")],
)
def test_sizes_as_people_read_them(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text
