"""docs/serving-checks.md: each row names tests, and they exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "serving-checks.md").read_text(encoding="utf-8")
NUM_COMPLAINTS = 15


def rows_of(section: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_row_names_tests_that_exist() -> None:
    reply, clients, complaints = (rows_of(section) for section in TEXT.split("\n## ")[1:])
    assert [row[0] for row in complaints] == [str(n + 1) for n in range(NUM_COMPLAINTS)]
    for rows, num_cells in ((reply, 2), (clients, 3), (complaints, 4)):
        assert rows
        for row in rows:
            assert len(row) == num_cells and all(row), row
            check_tests(row[-1])


def check_tests(cell: str) -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", cell)
    assert named and len(named) == cell.count("::"), cell
    for path, name in named:
        assert name in functions_of(TESTS / path), f"{path}::{name}"
