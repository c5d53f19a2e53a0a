"""Reading tensor by tensor, and writing so, takes next to no memory of one's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_memory import NUM_TENSORS, TENSOR_BYTES
from tiny_glm import tiny_glm130b
from tiny_zoo import save, write_ranks

MOST_BYTES = 20 * 2**20


@pytest.mark.parametrize("what", ["zip", "old", "safetensors", "write"])
def test_a_file_of_200_mb_takes_less_than_20(what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    shared = torch.ones(TENSOR_BYTES // 2, dtype=torch.float16)
    weights = {f"t{n}": shared.clone() for n in range(NUM_TENSORS)} if what != "write" else {}
    if what in ("zip", "old"):
        save(weights, path, what)
    elif what == "safetensors":
        safetensors.torch.save_file(weights, path)
    report = run(what, path)
    assert report["total_bytes"] == NUM_TENSORS * TENSOR_BYTES > 200 * 10**6
    assert report["peak_bytes"] < MOST_BYTES


def test_cutting_ranks_anew_takes_less_than_20_mb(tmp_path: Path) -> None:
    made = tiny_glm130b(
        has_inv_freq=True, num_layers=1, hidden_size=2**11, inner_hidden_size=10 * 2**10
    )
    largest = max(tensor.nbytes for tensor in made.tensors.values())
    report = run("ranks", write_ranks(tmp_path / "old", made.ranks(2)))
    assert report["total_bytes"] > 150 * 10**6 and largest > 3 * MOST_BYTES
    assert report["peak_bytes"] < MOST_BYTES


def run(what: str, path: Path) -> dict[str, int]:
    program = Path(__file__).with_name("checkpoint_memory.py")
    done = subprocess.run(
        [sys.executable, str(program), what, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, int] = json.loads(done.stdout)
    return report
