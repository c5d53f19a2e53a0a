"""Run as a program by test_smollm2.py: wrap and generate in a process of its own, print JSON.

Arguments: the model's folder, the folder of the file home. Half of the blocks stream, then all.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import bminf
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.offload import memory
from bminf.wrapping import plan_for


def data_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmData:")[1].split()[0]) * 1024


def main(folder: str, offload_dir: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    inputs = AutoTokenizer.from_pretrained(folder)("Once upon a time,", return_tensors="pt")
    print(json.dumps({mode: taken(folder, mode, offload_dir, inputs) for mode in ("half", "all")}))


def taken(folder: str, mode: str, offload_dir: str, inputs: Any) -> dict[str, Any]:
    gc.collect()
    memory.trim()
    most_data_bytes = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (most_data_bytes, most_data_bytes))
    before, data_before = rss_anon_bytes(), data_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = plan_for(model, quantization=False)
    num_resident = len(whole.blocks) // 2 if mode == "half" else 0
    block_bytes = whole.blocks[0].nbytes
    limit = whole.outside_bytes + (num_resident + 2) * block_bytes + block_bytes // 2
    with PeakMemory(is_cuda=False, baseline_bytes=rss_anon_bytes()) as wrapping:
        bminf.wrapper(model, False, limit, device="cpu", offload_dir=offload_dir)
    plan = bminf.plan_of(model)
    assert plan is not None
    allowed = data_before + plan.total_bytes + 100 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, most_data_bytes))
    with PeakMemory(is_cuda=False, baseline_bytes=before) as generating:
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return {
        "ids": ids.tolist(),
        "total_bytes": plan.total_bytes,
        "block_bytes": block_bytes,
        "num_resident": len(plan.resident),
        "num_streamed": len(plan.streamed),
        "generating_bytes": generating.peak_bytes,
        "wrapping_bytes": wrapping.peak_bytes,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
