"""Sizes as people write them ("6GB", "5.5GiB") and as they read them ("5.50 GiB")."""

from __future__ import annotations

import operator
import re

from bminf.errors import ArgumentError

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_MOST_BYTES = 2**60
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(size: int | float | str, argument: str = "size") -> int:
    """Bytes in `size`: a number of bytes, or a string with a unit ("6GB", "5.5GiB").

    argument: the name under which the caller got it, for the message.
    Raises ArgumentError for a negative or non-finite size, another type, or an unknown unit.
    """
    if isinstance(size, str):
        size = _parse_text(size, argument)
    elif hasattr(size, "__index__") and not isinstance(size, bool):
        size = operator.index(size)  # numpy's integers, too
    elif not isinstance(size, float):
        raise ArgumentError(
            f"{argument}={size!r} is of type {type(size).__name__}; "
            'give bytes as a number, or a string such as "6GB" or "5.5GiB"'
        )
    if not 0 <= size <= _MOST_BYTES:
        raise ArgumentError(
            f"{argument}={size!r}; give a number of bytes of at least 0 and at most 2**60"
        )
    return int(size)


def _parse_text(text: str, argument: str) -> float:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ArgumentError(
            f'{argument}={text!r} is not a size; write for example "6GB" or "5.5GiB"'
        )
    number, unit = match.groups()
    factor = _FACTORS.get(unit.lower())
    if factor is None:
        raise ArgumentError(
            f"{argument}={text!r} has the unknown unit {unit!r}; "
            "accepted: B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024)"
        )
    return float(number) * factor


def format_bytes(nbytes: float) -> str:
    """`nbytes` in the binary unit that reads best, three significant digits or more: "13.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"
