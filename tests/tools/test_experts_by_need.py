"""tools.experts_by_need measures a token of a random mixture of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.experts_by_need import main, make


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_measures_a_small_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    make(
        folder, 2, hidden_size=64, moe_intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    assert main([str(folder), "--rounds", "2", "--tokens", "3", "--fraction", "0.4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["slots"], found["experts"]) == (12, 32)
    # Every token wants two experts of each layer.
    expert_bytes = found["missed_bytes"] / 4 / (1 - found["hits"])
    assert 0 < found["hits"] < 1 and 3000 < expert_bytes < 8000
    assert found["token_s"] > 0 and found["of_accounted"] > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_measures_another_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, here = tmp_path / "model", Path(__file__).parents[2]
    make(
        folder, 4, hidden_size=64, moe_intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    argv = [str(folder), "--rounds", "2", "--tokens", "2", "--fraction", "0.5"]
    assert main([*argv, "--against", str(here)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["times_token_s"] == found["against_token_s"] / found["token_s"] > 0
    assert found["against_copied_bytes"] > 0
