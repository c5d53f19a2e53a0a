"""What every public method of a model, and its constructor, checks before its own arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

from bminf.errors import ArgumentError
from bminf.keywords import check_keywords, keywords_of
from bminf.layers.parallel import before_joining
from bminf.models.options import ALIASES

Method = TypeVar("Method", bound=Callable[..., Any])


def needs_open_model(method: Method) -> Method:
    """A method of LanguageModel that raises once the model is closed, before anything else.

    Then its keywords are checked, including those of Options if it has `**options`, and the aliases
    of an option are replaced by its name here.
    Raises UnsupportedModelError, UnknownKeywordError, or ArgumentError for two names of one option
    with different values.
    """
    parameters = inspect.signature(method).parameters
    names = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    has_options = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = keywords_of(method)

    def checked(model: Any, *arguments: Any, **keywords: Any) -> Any:
        options = [*model._defaults.names(), *ALIASES] if has_options else []
        called = f"{type(model).__name__}.{method.__name__}"
        check_keywords(called, keywords, dict.fromkeys([*accepted, *options]))
        if has_options:
            positional = dict(zip(names[1:], arguments, strict=False))
            keywords = _resolve_aliases(keywords, positional)
        return method(model, *arguments, **keywords)

    @functools.wraps(method)
    def call(model: Any, *arguments: Any, **keywords: Any) -> Any:
        model._open()
        # Of several ranks the first checks, and the others are told what is wrong.
        return model._called(method.__name__, partial(checked, model, *arguments, **keywords))

    return cast(Method, call)


def loads_a_model(constructor: Method) -> Method:
    """The constructor of a LanguageModel: of several ranks, all raise what one of them does."""
    names = list(inspect.signature(constructor).parameters)

    @functools.wraps(constructor)
    def call(*arguments: Any, **keywords: Any) -> None:
        given = {**dict(zip(names, arguments, strict=False)), **keywords}
        with before_joining(given.get("device")):
            constructor(*arguments, **keywords)

    return cast(Method, call)


def _resolve_aliases(keywords: Mapping[str, Any], positional: Mapping[str, Any]) -> dict[str, Any]:
    """`keywords` under the names of Options; an alias with the value None is ignored."""
    kept = {name: value for name, value in keywords.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        value = keywords.get(alias)
        if value is None:
            continue
        given = {**positional, **kept}
        if name in given and not _are_same(given[name], value):
            raise ArgumentError(
                f"{alias}={value!r} and {name}={given[name]!r} are two names of one option; give "
                "one of them"
            )
        if name not in given:
            kept[name] = value
    return kept


def _are_same(one: Any, other: Any) -> bool:
    """Whether they are equal; lists and tuples are compared by their items."""
    if any(not isinstance(value, Iterable) or isinstance(value, str) for value in (one, other)):
        return bool(one == other)
    return list(one) == list(other)
