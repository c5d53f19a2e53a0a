"""The notebooks of examples/ run from an empty folder, and say what was committed.

Of tools/notebooks.py. What is meant to change is written by
`python -m tools.notebooks examples/*.ipynb`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tools import notebooks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.ipynb"))

# Cells that say something else each time, of which a notebook may have two.
TIMED = {"cpm2_on_a_gtx_1060": ["code-18"], "serve_and_call": ["code-13"]}

OF_A_MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|usr|opt|work|var|Users|mnt)/|[A-Z]:\\\\")


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matplotlib")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_says_what_was_committed(file: Path, tmp_path: Path, fonts: Path) -> None:
    committed = notebooks.read(file)
    run = notebooks.executed(committed, tmp_path, fonts)
    cells = zip(notebooks.code_cells(committed), notebooks.code_cells(run), strict=True)
    for before, after in cells:
        assert notebooks.shows_picture(after) == notebooks.shows_picture(before), after.id
        if not notebooks.is_timing(before):
            assert notebooks.said(after) == notebooks.said(before), after.id


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_was_committed_is_one_whole_run(file: Path) -> None:
    notebook = notebooks.read(file)
    install, *others = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert install.metadata["tags"] == [notebooks.INSTALL] and "%pip install" in install.source
    assert [cell.execution_count for cell in others] == list(range(1, len(others) + 1))
    assert not install.outputs and not OF_A_MACHINE.search(file.read_text(encoding="utf-8"))
    for cell in others:
        assert all(output.get("name", "stdout") == "stdout" for output in cell.outputs), cell.id
        # The numbers of a picture are printed, since pictures are not compared.
        if notebooks.shows_picture(cell) and not notebooks.is_timing(cell):
            assert cell.outputs[0].output_type == "stream", cell.id


def test_cells_that_say_something_else_each_time_are_these() -> None:
    found: dict[str, Any] = {}
    for file in FILES:
        cells = notebooks.code_cells(notebooks.read(file))
        if timed := [cell.id for cell in cells if notebooks.is_timing(cell)]:
            found[file.stem] = timed
    assert found == TIMED and max(map(len, found.values())) <= 2


def test_all_examples_are_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    examples = [file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".ipynb")]
    assert len(examples) >= 14 and not [name for name in examples if f"({name})" not in listed]
