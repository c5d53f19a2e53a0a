"""The pictures of docs/ are those that tools/pictures.py draws, and a page shows each."""

from __future__ import annotations

from pathlib import Path

import pytest

import bminf
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


def test_a_curve_has_a_point_for_each_limit_that_is_enough() -> None:
    lines = pictures.pictures()["speed-cpm2.svg"].axes[0].lines
    least = bminf.models.plan_model("cpm2", max_length=pictures.LENGTH).least_limit
    enough = [limit for limit in pictures.LIMITS if limit >= least]
    assert len(lines[0].get_xdata()) == len(enough) < len(pictures.LIMITS)
