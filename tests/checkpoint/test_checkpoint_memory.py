"""Reading tensor by tensor, and writing so, takes next to no memory of one's own."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from checkpoint_memory import NUM_TENSORS, TENSOR_BYTES
from programs import told_by
from tiny_glm import tiny_glm130b
from tiny_zoo import save, write_ranks

MOST_BYTES = 20 * 2**20


def test_a_file_of_200_mb_takes_less_than_20(tmp_path: Path) -> None:
    shared = torch.ones(TENSOR_BYTES // 2, dtype=torch.float16)
    weights = {f"t{n}": shared.clone() for n in range(NUM_TENSORS)}
    for form in ("zip", "old"):
        save(weights, tmp_path / form, form)
    safetensors.torch.save_file(weights, tmp_path / "safetensors")
    report = run(tmp_path, "zip", "old", "safetensors", "write")
    for name, found in report.items():
        assert found["total_bytes"] == NUM_TENSORS * TENSOR_BYTES > 200 * 10**6, name
        assert found["peak_bytes"] < MOST_BYTES, name


def test_cutting_ranks_anew_takes_less_than_20_mb(tmp_path: Path) -> None:
    made = tiny_glm130b(
        has_inv_freq=True, num_layers=1, hidden_size=2**11, inner_hidden_size=10 * 2**10
    )
    largest = max(tensor.nbytes for tensor in made.tensors.values())
    write_ranks(tmp_path / "ranks", made.ranks(2))
    report = run(tmp_path, "ranks")["ranks"]
    assert report["total_bytes"] > 150 * 10**6 and largest > 3 * MOST_BYTES
    assert report["peak_bytes"] < MOST_BYTES


def run(folder: Path, *names: str) -> dict[str, dict[str, int]]:
    report: dict[str, dict[str, int]] = told_by(
        Path(__file__).with_name("checkpoint_memory.py"), folder, *names
    )
    assert list(report) == list(names)
    return report
