"""Run as a program by test_loading_memory.py: what loading takes in a process of its own, as JSON.

Arguments: a folder in which `tiny` is a small model, and names of others in it.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import bminf
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.offload import memory


def main(root: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for quantization in ("int8", "int4", None):  # what this process needs once
        run(bminf.load(root / "tiny", quantization=quantization, device="cpu"))
    settings = [{"quantization": "int4", "dtype": "float32"}, {"quantization": None}]
    print(json.dumps([growth(root / name, given) for name in names for given in settings]))


def growth(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    gc.collect()
    memory.trim()
    with PeakMemory(is_cuda=False, baseline_bytes=rss_anon_bytes()) as peak:
        model = bminf.load(folder, device="cpu", **settings)
    plan = bminf.plan_of(model)
    assert plan is not None and not plan.streamed
    run(model)
    block_bytes = max(block.nbytes for block in plan.blocks)
    return {"grown": peak.peak_bytes, "model": plan.total_bytes, "block": block_bytes}


def run(model: Any) -> None:
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
