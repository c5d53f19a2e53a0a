"""The kernel benchmark on the CPU: every call is checked, in groups that can be stopped."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
from host_launcher import NotingLauncher, served_by

from benchmarks import kernels, run
from benchmarks.harness import Result, Settings, measure_calls
from benchmarks.kernels import Inputs, Setup

CPU = torch.device("cpu")
ONCE = Settings(warmup=0, repeats=1, rounds=1)
QUICK = ("--warmup", "0", "--repeats", "2", "--rounds", "2", "--device", "cpu")
SMALL = ("--shapes", "64x64", "40x64", "--rows", "3", "1", "--rotate-bytes", "100KB")


def test_kernels_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    threads = torch.get_num_threads()
    assert run.main(["kernels", *QUICK, *SMALL, "--out", str(file)]) == 0
    assert torch.get_num_threads() == threads
    content = json.loads(file.read_text())
    assert content["parameters"]["left_out"] == [] and content["parameters"]["rows"] == [1, 3]
    results = {result["name"]: result for result in content["results"]}
    assert len(results) == 2 * 2 * (1 + 2 * 5)
    assert list(results)[:3] == [
        "linear 64x64 M=1: read",
        "linear rotated 64x64 M=1: torch float32",
        "linear rotated 64x64 M=1: torch bfloat16",
    ]
    assert all([len(times) for times in r["samples_s"]] == [2, 2] for r in results.values())
    rotated = results["linear rotated 40x64 M=3: int8, int8 activations"]
    assert rotated["details"]["num_sets"] == 38  # of 40 * 64 codes and 40 scales
    assert rotated["details"]["num_ops"] == 2 * 3 * 40 * 64
    assert rotated["details"]["num_bytes"] == 40 * 64 + 4 * 40 + 4 * 3 * (40 + 64)
    assert rotated["details"]["read_fraction"] > 0
    assert results["linear cached 40x64 M=3: int4"]["details"]["num_sets"] == 1
    assert "**linear rotated**" in capsys.readouterr().out


def test_every_kernel_is_checked_before_it_is_timed() -> None:
    formats = ("int8", "int4", "int4-g32-minimum")
    setup = Setup(CPU, torch.float16, ((16, 32),), (1, 32), formats, 0)
    launcher = NotingLauncher()
    results: list[Result] = []
    ops = [op for op in kernels.OPS if op != "linear"]
    with served_by(launcher):
        for _, calls in chain.from_iterable(kernels.calls_by_group(setup, op) for op in ops):
            results += measure_calls(calls(), ONCE, CPU)
    timed = {result["details"]["variant"] for result in results if result["failure"] is None}
    assert timed == {"torch float16"}
    reasons = {result["failure"].partition(":")[0] for result in results if result["failure"]}
    assert reasons == {"ArithmeticError"}  # they ran, and what they gave was wrong
    one = next(result for result in results if "g32-minimum few rows" in result["name"])
    assert one["details"]["weight_bytes"] == 16 * (32 // 2 + 2 * 2)  # a scale, a minimum a row
    assert {*launcher.names} == {
        "linear_few_rows",
        "linear_tensor_core",
        "dequantize",
        "quantize_rows",
        "gemm_w8a8_tensor_core",
        "scale_int32",
    }


def test_enough_copies_for_the_bytes_between_two_uses() -> None:
    def copies(rotate_bytes: int) -> int:
        setup = Setup(CPU, torch.float16, (), (), (), rotate_bytes)
        return Inputs(setup, (16, 32)).num_copies(100)

    assert [copies(size) for size in (0, 1, 100, 101)] == [1, 2, 2, 3]
