"""Run as a program by test_smollm2.py: wrap and generate in a process of its own, print JSON.

Arguments: the model's folder, "half" or "all" streamed, the folder of the file home.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import bminf
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.wrapping import plan_for


def data_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmData:")[1].split()[0]) * 1024


def main(folder: str, mode: str, offload_dir: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    inputs = AutoTokenizer.from_pretrained(folder)("Once upon a time,", return_tensors="pt")
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
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    with PeakMemory(is_cuda=False, baseline_bytes=before) as generating:
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    report = {
        "ids": ids.tolist(),
        "total_bytes": plan.total_bytes,
        "block_bytes": block_bytes,
        "num_resident": len(plan.resident),
        "num_streamed": len(plan.streamed),
        "generating_bytes": generating.peak_bytes,
        "wrapping_bytes": wrapping.peak_bytes,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
