"""Figures as files (bminf/plot/saving.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

import bminf
from bminf.errors import ArgumentError, OffloadError

STATS = [bminf.Stats(), bminf.Stats(expert_hits=3, expert_misses=1)]
HEADS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", HEADS)
def test_a_file_has_the_same_bytes_each_time(tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"{name}{suffix}" for name in ("one", "other")]
    for file in files:
        bminf.plot.save(bminf.plot.expert_hits(STATS, width_cm=8), file)
    one, other = (file.read_bytes() for file in files)
    assert one.startswith(HEADS[suffix]) and one == other


@pytest.mark.parametrize("name", ["plan.jpg", "plan", "png"])
def test_a_suffix_that_is_none_of_pictures_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match=r"does not end in \.png, \.svg, \.pdf"):
        bminf.plot.save(bminf.plot.expert_hits(STATS), tmp_path / name)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="there is no folder"):
        bminf.plot.save(bminf.plot.expert_hits(STATS), tmp_path / "none" / "plan.png")


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "plan.png").mkdir()
    with pytest.raises(OffloadError, match="cannot be written"):
        bminf.plot.save(bminf.plot.expert_hits(STATS), tmp_path / "plan.png")
