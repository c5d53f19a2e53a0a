"""lm-evaluation-harness in the process of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "cli"))  # for tiny_llama


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, as the test command of the README installs it, and prepares its data sets in a
    folder of the test."""
    from bminf.evaluation.harness import require_harness

    require_harness()
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
