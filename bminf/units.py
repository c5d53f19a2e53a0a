"""Parsing ("6GB", "5.5GiB") and formatting ("5.5 GiB") of sizes."""

from __future__ import annotations

import operator
import re

from bminf.errors import ArgumentError

_FACTORS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
# "6G" and "6Gi", as other tools write them, are 6 GB and 6 GiB.
_UNITS = {name.lower(): name for name in _FACTORS}
_UNITS |= {name.lower().removesuffix("b"): name for name in _FACTORS}
_MAX_BYTES = 2**60
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


class WrittenBytes(int):
    """A number of bytes with the text that format_bytes() shows for it, such as "6 GB"."""

    written: str

    def __new__(cls, nbytes: int, written: str = "") -> WrittenBytes:
        made = super().__new__(cls, nbytes)
        made.written = written
        return made


def parse_bytes(size: int | float | str, argument: str = "size") -> int:
    """Bytes in `size`: a number of bytes, or a string with a unit ("6GB", "5.5GiB").

    argument: the name of the caller's argument, for the message.
    "6G" is 6 GB (powers of 1000) and "6Gi" 6 GiB (powers of 1024).
    For a string returns a WrittenBytes, which is shown in its own unit.
    Raises ArgumentError for a negative or non-finite size, another type, or an unknown unit.
    """
    if isinstance(size, str):
        number, unit = _parse_text(size, argument)
        nbytes = _checked(float(number) * _FACTORS[unit], size, argument)
        return WrittenBytes(nbytes, _as_written(nbytes, number, unit))
    if isinstance(size, WrittenBytes):
        return size
    if hasattr(size, "__index__") and not isinstance(size, bool):
        size = operator.index(size)  # numpy's integers, too
    elif not isinstance(size, float):
        raise ArgumentError(
            f"{argument}={size!r} is of type {type(size).__name__}; "
            'give bytes as a number, or a string such as "6GB" or "5.5GiB"'
        )
    return _checked(size, size, argument)


def parse_rate(text: str, argument: str) -> int:
    """Bytes per second in `text`: "12GB", "12GB/s".

    Raises ArgumentError for 0, for anything but a size, and for a number without a unit, which is
    more likely to mean 12 GB than 12 bytes.
    """
    size = text.strip().removesuffix("/s")
    number, unit = _parse_text(size, argument)
    if size[-1] in "0123456789":
        raise ArgumentError(
            f'{argument}={text!r} has no unit, and would be bytes per second; write "{number}GB" '
            f"if it is {number} GB per second"
        )
    speed = int(float(number) * _FACTORS[unit])
    if speed == 0:
        raise ArgumentError(f'{argument}={text!r}; give more than 0, for example "12GB/s"')
    return _checked(speed, text, argument)


def _checked(nbytes: int | float, given: int | float | str, argument: str) -> int:
    if not 0 <= nbytes <= _MAX_BYTES:
        raise ArgumentError(
            f"{argument}={given!r}; give a number of bytes of at least 0 and at most 2**60"
        )
    return int(nbytes)


def _as_written(nbytes: int, number: str, unit: str) -> str:
    """As the user wrote it ("6 GB"), unless format_bytes() shows the same in that unit."""
    shown = format_bytes(nbytes)
    digits, own_unit = shown.split()
    is_exact = own_unit == unit and float(digits) * _FACTORS[unit] == nbytes
    return shown if is_exact or unit == "B" else f"{number} {unit}"


def _parse_text(text: str, argument: str) -> tuple[str, str]:
    """The number, and the unit as a key of _FACTORS."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ArgumentError(
            f'{argument}={text!r} is not a size; write for example "6GB" or "5.5GiB"'
        )
    number, unit = match.groups()
    known = _UNITS.get(unit.lower())
    if known is None:
        raise ArgumentError(
            f"{argument}={text!r} has the unknown unit {unit!r}; "
            "accepted: B, KB, MB, GB, TB (powers of 1000; also K, M, G, T), "
            "KiB, MiB, GiB, TiB (powers of 1024; also Ki, Mi, Gi, Ti)"
        )
    return number, known


def format_bytes(nbytes: float) -> str:
    """`nbytes` in a binary unit, with three significant digits or more: "13.5 MiB".

    A WrittenBytes is shown as it was written.
    """
    if isinstance(nbytes, WrittenBytes) and nbytes.written:
        return nbytes.written
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"
