"""docs/pitfalls.md: each pitfall has tests, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
SECTIONS = (TESTS.parent / "docs" / "pitfalls.md").read_text(encoding="utf-8").split("\n## ")[1:]


def named_in(section: str) -> list[tuple[str, str]]:
    """(path below tests/, name of a function) of each entry of its list."""
    return re.findall(r"^- `([\w/]+\.py)::(\w+)`$", section, re.MULTILINE)


def test_each_pitfall_names_tests_that_exist() -> None:
    assert SECTIONS
    for section in SECTIONS:
        assert named_in(section) and len(named_in(section)) == section.count("\n- "), section
        for path, name in named_in(section):
            tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
            assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name
