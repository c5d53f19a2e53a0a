from __future__ import annotations

import copy
import math
import pickle

import pytest

from bminf.errors import ArgumentError
from bminf.units import format_bytes, parse_bytes, parse_rate


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
        ("6G", 6_000_000_000),
        ("6Gi", 6 * 2**30),
        ("512m", 512_000_000),
        ("2k", 2000),
        ("1.5Ti", 3 * 2**39),
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


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("6GB", "6 GB"),
        ("6 gb", "6 GB"),
        ("6G", "6 GB"),
        ("1.25GiB", "1.25 GiB"),
        ("5.5GiB", "5.5 GiB"),
        ("400KiB", "400.0 KiB"),
        ("2048MiB", "2048 MiB"),
        ("3000", "2.9 KiB"),
        (3000, "2.9 KiB"),
    ],
)
def test_a_limit_is_shown_in_the_unit_it_came_in(given: int | str, text: str) -> None:
    size = parse_bytes(given)
    assert format_bytes(size) == text
    assert format_bytes(parse_bytes(size)) == text
    for copied in (copy.deepcopy(size), pickle.loads(pickle.dumps(size))):
        assert copied == size and format_bytes(copied) == text
    assert format_bytes(size + 0) == format_bytes(int(size))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("12GB", 12 * 10**9), ("12GB/s", 12 * 10**9), (" 1.5 GiB/s ", 3 * 2**29), ("25G", 25 * 10**9)],
)
def test_speeds_as_people_write_them(given: str, expected: int) -> None:
    assert parse_rate(given, "--link") == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("12", 'no unit.*write "12GB"'),
        ("12/s", 'no unit.*write "12GB"'),
        ("1e3", "no unit"),
        ("0GB", "more than 0"),
        ("fast", "not a size"),
        ("", "not a size"),
        ("12 bananas", "unknown unit"),
        ("9999999TB", "at most"),
    ],
)
def test_what_is_not_a_speed_is_refused_by_name(given: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=f"--link=.*{said}"):
        parse_rate(given, "--link")
