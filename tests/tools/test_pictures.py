"""The pictures of docs/ are those that tools/pictures.py draws, and a page shows each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import pictures

DOCS = Path(__file__).parents[2] / "docs"


def test_the_pictures_of_the_pages_are_those_that_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pictures.main([str(tmp_path)]) == 0
    drawn = sorted(tmp_path.iterdir())
    assert [str(file) for file in drawn] == sorted(capsys.readouterr().out.splitlines())
    shown = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    for file in drawn:
        assert file.read_bytes() == (DOCS / file.name).read_bytes(), "python -m tools.pictures"
        assert f"({file.name})" in shown
