"""The names that users write (bminf/__init__.py), and the arguments that these take, as
tests/snapshots has them."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from snapshot_files import REWRITE, check, differences

import bminf
import bminf.models
import bminf.plot
from bminf import cli, errors

FILE = "public_names.json"


class Sample:
    """As a class of the library."""

    size: int

    def __init__(self, size: int = 3) -> None:
        self.size, self.name = size, "sample"

    def grown(self, by: int, *, twice: bool = False) -> Sample:
        return Sample(self.size + by * (1 + twice))

    @property
    def is_large(self) -> bool:
        return self.size > 100

    @staticmethod
    def least() -> int:
        return 0

    def _hidden(self) -> None: ...


Sample.__module__ = "bminf.sample"


def public_names() -> dict[str, str]:
    """Name -> its signature, or what else it is; of the library and the command line."""
    modules = [name for module in (bminf, bminf.models, bminf.plot) for name in names_of(module)]
    return dict([*modules, *names_of_errors(), *options()])


def names_of(module: ModuleType) -> Iterator[tuple[str, str]]:
    for name in module.__all__:
        yield from described(f"{module.__name__}.{name}", getattr(module, name))


def names_of_errors() -> Iterator[tuple[str, str]]:
    for name, value in sorted(vars(errors).items()):
        if inspect.isclass(value) and value.__module__ == errors.__name__:
            bases = ", ".join(base.__name__ for base in value.__bases__)
            yield f"bminf.errors.{name}", f"class ({bases})"
            yield from members(f"bminf.errors.{name}", value)


def described(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The name itself, and the public members of a class."""
    if not inspect.isclass(value):
        yield name, str(inspect.signature(value))
        return
    yield name, f"class {inspect.signature(value)}"
    yield from members(name, value)


def members(name: str, kind: type) -> Iterator[tuple[str, str]]:
    """What the library's own classes give, not what torch's do."""
    own = [base for base in reversed(kind.__mro__) if base.__module__.split(".")[0] == "bminf"]
    found: dict[str, str] = {}
    for base in own:
        notes = inspect.get_annotations(base)
        found |= {key: f"attribute {note}" for key, note in notes.items()}
        found |= {key: "attribute" for key in assigned(base) if key not in found}
        found |= {key: member(value) for key, value in vars(base).items() if key not in found}
    yield from ((f"{name}.{key}", found[key]) for key in sorted(found) if key[0] != "_")


def assigned(kind: type) -> Iterator[str]:
    """Attributes that the constructor gives each object."""
    if not inspect.isfunction(begin := vars(kind).get("__init__")) or is_generated(begin):
        return
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(begin))))):
        is_stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_stored and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr


def is_generated(function: Any) -> bool:
    """A dataclass's constructor has no source; its fields are annotated."""
    return bool(inspect.unwrap(function).__code__.co_filename.startswith("<"))


def member(value: Any) -> str:
    if isinstance(value, property):
        return f"property {inspect.signature(value.fget).return_annotation}"
    if isinstance(value, staticmethod | classmethod):
        return f"{type(value).__name__} {inspect.signature(value.__func__)}"
    return str(inspect.signature(value)) if callable(value) else f"attribute {value!r}"


def options() -> Iterator[tuple[str, str]]:
    """The verbs of the command line, and what each takes; not their help."""
    for verb in cli.VERBS:
        parser = argparse.ArgumentParser()
        import_module(f"bminf.cli.{verb}").add_arguments(parser)
        for action in parser._actions:
            name = " ".join(action.option_strings) or action.dest
            if "--help" not in name:
                yield f"bminf {verb} {name}", option(action)


def option(action: argparse.Action) -> str:
    choices = "" if action.choices is None else f" of {', '.join(map(str, action.choices))}"
    needed = " required" if action.required else ""
    return (
        f"{action.metavar or 'flag'} nargs={action.nargs} default={action.default}{choices}{needed}"
    )


def test_the_public_names_are_those_of_the_snapshot() -> None:
    check(FILE, public_names())


def test_a_class_is_described_by_all_that_it_gives() -> None:
    assert dict(described("Sample", Sample)) == {
        "Sample": "class (size: 'int' = 3) -> 'None'",
        "Sample.grown": "(self, by: 'int', *, twice: 'bool' = False) -> 'Sample'",
        "Sample.is_large": "property bool",
        "Sample.name": "attribute",
        "Sample.least": "staticmethod () -> 'int'",
        "Sample.size": "attribute int",
    }


def test_what_went_came_and_changed_is_told() -> None:
    told = list(differences({"a": "()", "b": "(x)"}, {"b": "(y)", "c": "()"}))
    assert told == ["went     a: ()", "came     c: ()", "changed  b: (x)\n      to    (y)"]


def test_a_difference_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REWRITE, raising=False)  # or it would write these
    names = public_names()
    with pytest.raises(AssertionError, match=r"came     bminf\.more: \(\)"):
        check(FILE, {**names, "bminf.more": "()"})
    del names["bminf.wrapper"]
    with pytest.raises(AssertionError, match=r"went     bminf\.wrapper: "):
        check(FILE, names)
