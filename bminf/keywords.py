"""Errors for unknown keyword arguments, which suggest the most similar known one."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar, cast

from bminf.errors import UnknownKeywordError

Function = TypeVar("Function", bound=Callable[..., Any])
Kind = TypeVar("Kind", bound=type[Any])


def check_keywords(function: str, given: Iterable[str], accepted: Collection[str]) -> None:
    """Raise UnknownKeywordError for the first keyword in `given` that is not in `accepted`.

    function: its name in the message, without parentheses.
    """
    for name in given:
        if name not in accepted:
            near = difflib.get_close_matches(name, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownKeywordError(
                f"{function}() has no keyword {name!r}{hint} (accepted: {', '.join(accepted)})"
            )


def keywords_of(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters that may be given as keywords, without `self`."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name != "self"
    ]


def known_keywords(function: Function) -> Function:
    """`function`, but unknown keywords raise UnknownKeywordError instead of TypeError.

    For a constructor, the message names the class.
    """
    accepted = keywords_of(function)

    @functools.wraps(function)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        is_constructor = function.__name__ == "__init__"
        name = type(arguments[0]).__name__ if is_constructor else function.__name__
        check_keywords(name, keywords, accepted)
        return function(*arguments, **keywords)

    return cast(Function, checked)


def known_fields(kind: Kind) -> Kind:
    """A dataclass of which unknown fields raise UnknownKeywordError instead of TypeError."""
    kind.__init__ = known_keywords(kind.__init__)
    return kind
