"""Checks of numbers and token ids from users, before any work starts."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields
from typing import Any, TypeGuard

from bminf.errors import ArgumentError, UnsupportedModelError

_SHOWN = 5  # of the wrong ids: a message should not hold a whole vocabulary


def plain(value: Any) -> Any:
    """One number of numpy, or a tensor (), as Python's own; anything else as it is."""
    is_one = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_one else value


def make_plain(options: Any) -> None:
    """Put plain() numbers in the fields of a frozen dataclass that is being made."""
    for one in fields(options):
        given = getattr(options, one.name)
        value = plain(given)
        if value is not given:
            object.__setattr__(options, one.name, value)


def check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    """Raise ArgumentError if one of `ids` is not an id of the vocabulary."""
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ArgumentError(
            f"{name} holds {', '.join(map(repr, wrong[:_SHOWN]))}{more}; accepted: ids of the "
            f"vocabulary, 0 to {vocab_size - 1}"
        )


def check_banned(ids: Collection[int], vocab_size: int) -> None:
    """Raise ArgumentError if `ids` are not in the vocabulary, or are all of it."""
    check_ids("banned_ids", ids, vocab_size)
    if len(set(ids)) == vocab_size:
        raise ArgumentError(
            f"banned_ids holds all {vocab_size} ids of the vocabulary; leave at least one"
        )


def check_int(name: str, value: int | None, minimum: int, none: str = "") -> None:
    """Raise ArgumentError for anything but an int of at least `minimum`.

    none: what None stands for, where it is accepted.
    """
    if none and value is None:
        return
    if type(value) is not int or value < minimum:
        also = f", or {none}" if none else ""
        raise ArgumentError(f"{name}={value!r}; accepted: an int of at least {minimum}{also}")


def check_positive(name: str, value: int | None, none: str = "") -> None:
    """Raise ArgumentError for anything but an int of at least 1; see check_int()."""
    check_int(name, value, 1, none)


def check_bool(name: str, value: bool) -> None:
    """Raise ArgumentError for anything but True and False."""
    if type(value) is not bool:
        raise ArgumentError(f"{name}={value!r}; accepted: True, False")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is an int or a float, and finite; a bool is not."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def check_sizes(config: object, *names: str) -> None:
    """Raise ArgumentError for a field of a configuration that is not a positive int."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ArgumentError(f"{name}={value!r}; a whole number above 0 is needed")


def check_eps(name: str, value: float) -> None:
    """Raise ArgumentError for anything but a number between 0 and 1."""
    if not is_number(value) or not 0 < value < 1:
        raise ArgumentError(f"{name}={value!r}; a number between 0 and 1 is needed")


def non_finite_logits(rows: Collection[int]) -> UnsupportedModelError:
    """The error for logits from which no token can be chosen."""
    return UnsupportedModelError(
        f"the model's logits are not finite numbers in row {', '.join(map(str, rows))} of this "
        "step, so no token can be chosen: half precision overflowed, or the weights are damaged; "
        "try dtype=torch.float32 or torch.bfloat16, or load the checkpoint anew"
    )
