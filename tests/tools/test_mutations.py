"""The faults can be planted, and the check says which of them the tests have noticed."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

from tools import mutations
from tools.faults import FAULTS, Fault
from tools.mutations import STAGES, examine, located, main, nearest, plant

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
def last(size):
    return size - 1


def shown(size):
    return f"{size} items"
"""
TEST = """
from toy.room.count import last


def test_last():
    assert last(3) == 2
"""
FALLS = Fault("falls", "toy/room/count.py", "size - 1", "size", "The last item is not found.")
SURVIVES = Fault("survives", "toy/room/count.py", "{size} items", "items", "No number is shown.")
ABSENT = Fault("absent", "toy/room/count.py", "size + 1", "size", "None: it is of another time.")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one source, of which half is tested."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take long to load
    for name, text in {
        "toy/__init__.py": "",
        "toy/room/__init__.py": "",
        "toy/room/count.py": COUNT,
        "tests/room/test_count.py": TEST,
        "pytest.ini": "[pytest]\nmarkers = slow: takes long\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_what_became_of_each_fault_is_told(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutations, "FAULTS", (FALLS, SURVIVES, ABSENT))
    assert main(["--checkout", str(toy), "--only", "*s*"]) == 1
    shown = capsys.readouterr()
    found = {line["fault"]: line for line in map(json.loads, shown.out.splitlines())}
    fell = found["falls"]
    assert fell["outcome"] == "fell" and fell["stage"] == "quick" and fell["cpu_s"]["quick"] > 0
    assert fell["test"] == "tests/room/test_count.py::test_last"
    assert found["survives"]["outcome"] == "survived" and [*found["survives"]["cpu_s"]] == [*STAGES]
    assert found["absent"]["outcome"] == "absent" and not found["absent"]["cpu_s"]
    assert shown.err.splitlines() == ["1 of 3 fell", "absent (absent)", "survives (survived)"]
    assert (toy / "toy/room/count.py").read_text() == COUNT


def test_a_test_that_fails_without_the_fault_tells_nothing(toy: Path) -> None:
    (toy / "tests/room/test_count.py").write_text(TEST.replace("== 2", "== 4"))
    found = examine(FALLS, toy, ["quick"], 60)
    assert found["outcome"] == "its test fails anyway" and found["test"].endswith("::test_last")


def test_files_that_cannot_be_collected_tell_nothing_either(toy: Path) -> None:
    (toy / "tests/room/test_count.py").write_text("import is_not_there")
    found = examine(FALLS, toy, ["whole"], 60)
    assert found["outcome"] == "its test fails anyway"
    assert found["test"] == "tests/room/test_count.py"


def test_a_name_that_no_fault_has_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"--only ring: no fault has such a name"):
        main(["--only", "ring"])


def test_what_only_a_slow_test_sees_falls_in_the_whole(toy: Path) -> None:
    (toy / "tests/room/test_count.py").write_text(
        TEST.replace("def test_last", "import pytest\n@pytest.mark.slow\ndef test_last")
    )
    found = examine(FALLS, toy, [*STAGES], 60)
    assert found["outcome"] == "fell" and found["stage"] == "whole"


def test_what_does_not_end_has_fallen(toy: Path) -> None:
    """No pytest starts in a thousandth of a second."""
    found = examine(SURVIVES, toy, ["whole"], 0.001)
    assert found["outcome"] == "fell" and "no end in 0.001 s" in found["test"]


def test_a_line_is_found_where_it_has_moved_to_but_not_twice(toy: Path) -> None:
    room = toy / "toy" / "room"
    assert located(toy, FALLS) == Path("toy/room/count.py")
    (room / "count.py").rename(room / "sizes.py")
    assert located(toy, FALLS) == Path("toy/room/sizes.py")
    (room / "again.py").write_text(COUNT)
    with pytest.raises(ValueError, match=r"falls: 'size - 1' stands 2 times in toy/room/count\.py"):
        located(toy, FALLS)


def test_the_nearest_tests_are_found_by_name(tmp_path: Path) -> None:
    names = ("test_top.py", "a/test_ring.py", "offload/test_disk.py", "offload/test_ring.py")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(source: str) -> list[list[str]]:
        groups = nearest(tmp_path, Path(source))
        return [[str(file.relative_to(tmp_path)) for file in files] for files in groups]

    assert found("bminf/offload/ring.py") == [[names[1], names[3]], [names[2]]]
    assert found("bminf/offload/backends/cuda.py") == [[], [names[2], names[3]]]
    assert found("bminf/units.py") == [[], [names[0]]]
    assert found("bminf/unheard/of.py") == [[], []]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_can_be_planted(fault: Fault, tmp_path: Path) -> None:
    """Where it says, and the file is Python still."""
    assert located(ROOT, fault) == Path(fault.file) and fault.breaks.endswith(".")
    source = Path(shutil.copy(ROOT / fault.file, tmp_path))
    plant(source, fault)
    assert ast.dump(ast.parse(source.read_text())) != ast.dump(
        ast.parse((ROOT / fault.file).read_text())
    )


def test_the_faults_are_of_all_folders() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 60
    folders = {path.parent for path in (ROOT / "bminf").rglob("*.py") if path.stem != "__init__"}
    assert {(ROOT / fault.file).parent for fault in FAULTS} == folders
