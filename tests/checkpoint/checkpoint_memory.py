"""Run as a program by test_checkpoint_memory.py: what reading and writing cost, printed as JSON.

Arguments: the folder of the files, and what to do there, one after the other: zip, old,
safetensors, write, or ranks of a GLM-130B, each with the file or folder of its name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tiny_glm

import torch
from tiny_glm import reshard

from bminf.checkpoint.safetensors_file import read_safetensors, write_safetensors
from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.layout import Layout, TensorSpec

NUM_TENSORS, TENSOR_BYTES = 100, 2**21


def read(path: Path, is_torch: bool) -> int:
    weights = weights_of(read_torch_file(path), path) if is_torch else read_safetensors(path)
    total = 0
    for stored in weights.values():
        tensor = stored.read()
        assert float(tensor.view(-1)[::512].float().sum()) != 0  # every page
        total += tensor.nbytes
    return total


def write(path: Path) -> int:
    spec = TensorSpec((TENSOR_BYTES,), (1,), torch.uint8)
    names = [f"t{n}" for n in range(NUM_TENSORS // 2)]
    layout = Layout.of(dict.fromkeys(names, spec), keep_addresses=False)

    def tensors(block: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield name, torch.ones(TENSOR_BYTES, dtype=torch.uint8)

    write_safetensors(path, {"a": layout, "b": layout}, tensors, {})
    return NUM_TENSORS * TENSOR_BYTES


def cut_anew(folder: Path) -> int:
    reshard(folder, folder.with_name("more"), 4)
    reshard(folder, folder.with_name("quantized"), 1, 4)
    return sum(path.stat().st_size for path in folder.glob("*/*.pt"))


WAYS: dict[str, Callable[[Path], int]] = {
    "zip": lambda path: read(path, is_torch=True),
    "old": lambda path: read(path, is_torch=True),
    "safetensors": lambda path: read(path, is_torch=False),
    "write": write,
    "ranks": cut_anew,
}


def main(folder: str, *names: str) -> None:
    torch.ones(2**20).sum()  # what torch sets up at its first operation, threads included
    report = {}
    for name in names:
        with PeakMemory(is_cuda=False, baseline_bytes=rss_anon_bytes()) as peak:
            total = WAYS[name](Path(folder, name))
        report[name] = {"total_bytes": total, "peak_bytes": peak.peak_bytes}
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
