"""A layer of GLM-130B in full size keeps to its limit, and computes there what it does without."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # as in test_benchmarks.py

from benchmarks.glm_memory import step_in_a_process
from benchmarks.glm_model import PUBLISHED
from bminf.cli.measure import rss_anon_bytes

MB = 10**6
LIMIT = 850 * MB
UP_BYTES = 2 * PUBLISHED.intermediate_size * PUBLISHED.hidden_size // 2


@pytest.mark.skipif(rss_anon_bytes() is None, reason="the system does not tell RssAnon")
def test_a_full_size_layer_within_a_limit_below_its_size(tmp_path: Path) -> None:
    """Two slots of its largest matrix leave 44 MB for all else. The whole check, with three layers,
    the head and converting, is `python -m benchmarks.glm_memory check`."""
    layer = ("decode", "--layers", "1", "--vocabulary", "256", "--max-length", "16")
    commands = [
        (*layer, "--folder", str(tmp_path / "limited"), "--memory-limit", str(LIMIT)),
        (*layer, "--folder", str(tmp_path / "whole")),
    ]
    with ThreadPoolExecutor() as pool:
        limited, whole = pool.map(lambda command: step_in_a_process(*command), commands)
    assert whole["weights"] > 900 * MB > LIMIT
    assert limited["used"] <= 1.05 * LIMIT, limited
    assert limited["planned"] <= LIMIT and limited["weights"] > 2 * UP_BYTES
    assert limited["streamed"] == 4 and limited["copied"] > whole["weights"]
    assert whole["streamed"] == whole["copied"] == 0
    assert whole["used"] <= 1.01 * whole["planned"], whole
    assert limited["logits_sha256"] == whole["logits_sha256"]
