"""docs/troubleshooting.md quotes what the code can raise, under the class that it has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest
from pages import ROOT, read

from bminf import errors

PAGE = "docs/troubleshooting.md"
QUOTED = re.findall(r"`(?:([A-Z]\w+Error): |(?=\.\.\. \w))([^`]+)`", read(PAGE))
# What is different each time, as the page and as the code have it.
_GIVEN = re.compile(r"\.\.\.|cuda:0|(?<=rank )1\b|(?<=--device )cuda\b")


@cache
def raised() -> list[tuple[str, str]]:
    """(class, text) of each text within a `raise`, and ("", text) of all others, of which some
    are raised elsewhere."""
    found = []
    for path in sorted((ROOT / "bminf").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        within = {id(node): name for name, one in raises(tree) for node in ast.walk(one)}
        found += [(within.get(id(node), ""), text) for node, text in texts(tree)]
    return found


def raises(tree: ast.AST) -> Iterator[tuple[str, ast.Raise]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield ast.unparse(node.exc.func).rpartition(".")[2], node


def texts(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (one.value if isinstance(one, ast.Constant) else "..." for one in node.values)
            yield node, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value


def classes_of(text: str) -> set[str]:
    """Those that are raised with such a text."""
    parts = [re.escape(part) for part in _GIVEN.split(text)]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return {name for name, given in raised() if pattern.search(given)}


@pytest.mark.parametrize(("name", "text"), QUOTED, ids=[text for _, text in QUOTED])
def test_a_message_is_one_of_the_code(name: str, text: str) -> None:
    found = classes_of(text)
    assert found, f"nothing in bminf says {text!r}"
    assert not name or name in found or found == {""}, f"{text!r} is raised as {found}"


def test_all_that_is_quoted_was_found() -> None:
    assert len(QUOTED) >= read(PAGE).count("Error: ") > 15
    assert all(issubclass(getattr(errors, name), errors.BMInfError) for name, _ in QUOTED if name)


def test_what_the_code_does_not_say_is_noticed() -> None:
    assert classes_of("the limit of ... is more than the least") == set()
