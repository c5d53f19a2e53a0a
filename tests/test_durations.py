"""Which tests are slow: chosen from a list of seconds, the same in every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import durations
import pytest

LINES = """\
0.5 test_a.py::test_long
0.05 test_a.py::test_many
0.01 test_b.py::test_short
0.1 test_b.py::test_gone
"""


class Item:
    """As much of a pytest.Item as is looked at."""

    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid
        self.markers: list[str] = []

    def add_marker(self, marker: str) -> None:
        self.markers.append(marker)


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(durations, "LIST", tmp_path / "seconds.txt")
    monkeypatch.setattr(durations, "QUICK_S", 0.2)
    durations.LIST.write_text(LINES, encoding="utf-8")
    many = [f"test_a.py::test_many[{i}]" for i in range(10)]
    short = [f"test_b.py::test_short[{i}]" for i in range(10)]
    names = [*short, "test_c.py::test_new", "test_a.py::test_long", *many]
    return [Item(name) for name in names]


def test_a_function_keeps_the_cases_that_fit_into_its_time(items: Any) -> None:
    durations.mark_slow(items)
    quick = [item.nodeid for item in items if not item.markers]
    assert [name for name in quick if "many" in name] == [
        f"test_a.py::test_many[{i}]" for i in (0, 2, 5, 7)
    ]
    assert sum("short" in name for name in quick) == 10
    assert "test_c.py::test_new" in quick and "test_a.py::test_long" not in quick
    assert all(item.markers in ([], ["slow"]) for item in items)


def test_the_longest_file_comes_first_and_files_stay_together(items: Any) -> None:
    before = [item.nodeid for item in items if item.nodeid.startswith("test_a")]
    durations.longest_files_first(items)
    files = [item.nodeid.partition("::")[0] for item in items]
    assert files == ["test_a.py"] * 11 + ["test_b.py"] * 10 + ["test_c.py"]
    assert [item.nodeid for item in items[:11]] == before


@pytest.mark.parametrize("file", sorted({name.partition("::")[0] for name in durations.seconds()}))
def test_what_is_listed_exists(file: str) -> None:
    """What is renamed and not listed anew would run in the quick run, however long it takes."""
    text = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
    for name in durations.seconds():
        if name.startswith(f"{file}::"):
            assert f"def {name.rpartition('::')[2]}(" in text, name


def test_without_a_list_nothing_is_slow(items: Any) -> None:
    durations.LIST.unlink()
    durations.mark_slow(items)
    assert not any(item.markers for item in items)
