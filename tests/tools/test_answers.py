"""tools.answers measures a token of each small model, with the bminf of each checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.answers import MEASUREMENTS, main

ROOT = Path(__file__).resolve().parents[2]


def test_a_token_of_each_model_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout, out = tmp_path / "checkout", tmp_path / "out.json"
    checkout.mkdir()
    (checkout / "bminf").symlink_to(ROOT / "bminf")
    sizes = ["--repeats", "1", "--tokens", "12"]
    assert main([str(checkout), *sizes, "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text())
    assert {name: len(samples) for name, samples in found["samples_s"].items()} == {
        name: 1 for name in MEASUREMENTS
    }
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*MEASUREMENTS]
