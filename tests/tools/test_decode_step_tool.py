"""tools.decode_step measures a decode step of CPM-2, launched on a GPU that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.decode_step import main

ROOT = Path(__file__).resolve().parents[2]


def test_a_step_of_a_checkout_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main([str(ROOT), "--repeats", "1", "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text())
    assert found["samples_s"].keys() == {"step"} and found["checkout"] == str(ROOT)
    assert len(found["samples_s"]["step"]) == 1 and found["samples_s"]["step"][0] > 0
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[0] == "step"
