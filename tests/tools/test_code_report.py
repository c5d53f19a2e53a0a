"""What tools.code_report counts, on a small package made for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.code_report import (
    Package,
    code_lines,
    cycles,
    docstrings,
    function_lengths,
    imports,
    main,
    measures,
    messages,
)

FIRST = '''"""Two lines
of docstring."""

from typing import TYPE_CHECKING

import small.second
from small import third as other

if TYPE_CHECKING:
    from small.glm_names import Name

LIMIT = 3
"""Of everything."""


# A comment.
@staticmethod
def shown(name: str) -> str:
    """Has one."""

    return f"""{name}

    at the end"""


class Kept:
    def plain(self) -> None:  # a comment behind code
        pass

    def _own(self) -> None: ...

    class _Hidden:
        def inside(self) -> None: ...
'''
SECOND = """
def later(size, names):
    from small.first import LIMIT
    if size > LIMIT:
        raise ValueError(f"{size} is more than {LIMIT}; " "take fewer"
            f"{' or ' + names[0] if names else ''}")
    warnings.warn("this is slow", stacklevel=2)
    logger.warning("%s is slow", size)
    return "lower the size" + names["first name"]

def _hidden(): ...
"""
FILES = {
    "__init__.py": "from small.first import LIMIT\n",
    "first.py": FIRST,
    "second.py": SECOND,
    "third.py": "import json\nfrom small import LIMIT\n",
    "glm_names.py": "import small.first\nName = 'GLM'\n",
    "deep/__init__.py": "",
    "deep/_own.py": "def reached(): ...\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Package:
    root = tmp_path / "small"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Package(root)


def test_docstrings_comments_and_blanks_are_no_code() -> None:
    shown = [FIRST.splitlines()[number - 1].strip() for number in sorted(code_lines(FIRST))]
    assert shown == [
        "from typing import TYPE_CHECKING",
        "import small.second",
        "from small import third as other",
        "if TYPE_CHECKING:",
        "from small.glm_names import Name",
        "LIMIT = 3",
        "@staticmethod",
        "def shown(name: str) -> str:",
        'return f"""{name}',
        'at the end"""',
        "class Kept:",
        "def plain(self) -> None:  # a comment behind code",
        "pass",
        "def _own(self) -> None: ...",
        "class _Hidden:",
        "def inside(self) -> None: ...",
    ]


def test_a_function_is_as_long_as_its_code(package: Package) -> None:
    found = dict(item for source in package.sources for item in function_lengths(source))
    assert found == {
        "small.first.shown": 3,
        "small.first.plain": 2,
        "small.first._own": 1,
        "small.first.inside": 1,
        "small.second.later": 8,
        "small.second._hidden": 1,
        "small.deep._own.reached": 1,
    }


def test_docstrings_are_asked_of_what_users_reach(package: Package) -> None:
    """shown, Kept, Kept.plain and later, of which the first has one."""
    assert docstrings(package.sources) == (1, 4)


def test_imports_are_told_apart_by_when_they_run(package: Package) -> None:
    at_import = imports(package.sources, is_lazy=False)
    assert at_import["small"] == {"small.first"}
    assert at_import["small.first"] == {"small.second", "small.third"}
    assert at_import["small.second"] == at_import["small.deep"] == set()
    assert at_import["small.third"] == {"small"}
    assert imports(package.sources)["small.second"] == {"small.first"}
    assert "small.glm_names" not in imports(package.sources)["small.first"]
    assert "small.glm_names" in imports(package.sources, is_typing=True)["small.first"]


def test_cycles_are_groups_that_import_each_other(package: Package) -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycles({"a": {"b"}, "b": {"a"}, "c": {"d", "a"}, "d": {"c"}}) == [["a", "b"], ["c", "d"]]
    at_import = [["small", "small.first", "small.third"]]
    assert cycles(imports(package.sources, is_lazy=False)) == at_import
    assert cycles(imports(package.sources)) == [[*at_import[0][:2], "small.second", "small.third"]]


def test_the_report_has_all_of_it(package: Package) -> None:
    found = measures(package)
    assert found["files"] == "7" and found["functions"] == "7"
    assert found["code lines"] == str(16 + 9 + 1 + 2 + 2 + 1)
    assert found["their code lines, median / p90 / max"] == "1 / 8 / 8"
    assert found["functions over 45 code lines"] == "0"
    assert found["public names with a docstring"] == "1 of 4, 25.0%"
    assert found["import cycles, at import"] == "small <-> small.first <-> small.third"
    assert "small.glm_names" in found["import cycles, with TYPE_CHECKING"]
    assert found["files that name GLM"] == "2, 1 of them in their own name"


def test_messages_show_texts_and_no_names_of_variables(package: Package) -> None:
    assert messages(package) == [
        "first.py: text: {} at the end",
        "second.py: ValueError: {} is more than {}; take fewer{ or }",
        "second.py: text: lower the size",
        "second.py: warn: this is slow",
        "second.py: warning: %s is slow {}",
    ]
    assert messages(package, has_files=False)[0].startswith("ValueError: {} is more")


def test_the_command_prints_either(package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(package.path)]) == 0
    assert "code lines" in capsys.readouterr().out
    assert main([str(package.path), "--messages", "--without-files"]) == 0
    assert "warn: this is slow\n" in capsys.readouterr().out
