"""Checks of a configuration, which is often typed in or edited by hand."""

from __future__ import annotations

from bminf.errors import ArgumentError
from bminf.ops.gated_linear import check_activation


def check_sizes(config: object, *names: str) -> None:
    """Raise ArgumentError for a field that is not a whole number above 0."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ArgumentError(f"{name}={value!r}; a whole number above 0 is needed")


def check_eps(name: str, value: float) -> None:
    """Raise ArgumentError for what is not a number between 0 and 1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1:
        raise ArgumentError(f"{name}={value!r}; a number between 0 and 1 is needed")


def check_hidden_act(name: str) -> None:
    """Raise ArgumentError for an activation that there is no function for."""
    try:
        check_activation(name)
    except ArgumentError as error:
        raise ArgumentError(f"hidden_act: {error}") from error
