"""Run as a program by test_smollm2.py: wrap and generate in a process of its own, print JSON.

Arguments: the model's folder, the folder of the file home. Half of the blocks stream, then all;
then all in 4 bits, and all of a model whose head is not tied to its embedding.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # and scipy, where it is
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import bminf
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.offload import memory
from bminf.wrapping import plan_for

MODES = ("half", "all", "int4", "untied")


def data_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmData:")[1].split()[0]) * 1024


def main(folder: str, offload_dir: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    inputs = AutoTokenizer.from_pretrained(folder)("Once upon a time,", return_tensors="pt")
    print(json.dumps({mode: taken(folder, mode, offload_dir, inputs) for mode in MODES}))


def taken(folder: str, mode: str, offload_dir: str, inputs: Any) -> dict[str, Any]:
    gc.collect()
    memory.trim()
    most_data_bytes = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (most_data_bytes, most_data_bytes))
    before, data_before = rss_anon_bytes(), data_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if mode == "untied":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    quantization = "int4" if mode == "int4" else False
    whole = plan_for(model, quantization)
    num_resident = len(whole.blocks) // 2 if mode == "half" else 0
    block_bytes = whole.blocks[0].nbytes
    limit = whole.fixed_bytes + (num_resident + 2) * block_bytes + block_bytes // 2
    with PeakMemory(is_cuda=False, baseline_bytes=rss_anon_bytes()) as wrapping:
        bminf.wrapper(model, quantization, limit, device="cpu", offload_dir=offload_dir)
    plan = bminf.plan_of(model)
    assert plan is not None
    # The checkpoint stays mapped where rows of it are read, and a private map counts as data.
    mapped_bytes = Path(folder, "model.safetensors").stat().st_size if plan.tables else 0
    allowed = data_before + plan.total_bytes + mapped_bytes + 100 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, most_data_bytes))
    with PeakMemory(is_cuda=False, baseline_bytes=before) as generating:
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return {
        "ids": ids.tolist(),
        "total_bytes": plan.total_bytes,
        "least_limit": plan.least_limit,
        "table_bytes": plan.table_bytes,
        "outside_bytes": plan.outside_bytes,
        "block_bytes": block_bytes,
        "num_resident": len(plan.resident),
        "num_streamed": len(plan.streamed),
        "generating_bytes": generating.peak_bytes,
        "wrapping_bytes": wrapping.peak_bytes,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
