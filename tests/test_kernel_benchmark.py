"""The kernel benchmark on the CPU: every call is checked, in groups that can be stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from host_launcher import NotingLauncher, served_by

import bminf
from benchmarks import cpu_products, kernels, run
from benchmarks.harness import Result, Settings, measure_calls
from benchmarks.products import Inputs, Rows, Setup
from bminf.ops import cpu_linear
from tools.other_products import OTHER_PRODUCTS

CPU = torch.device("cpu")
ONCE = Settings(warmup=0, repeats=1, rounds=1)
QUICK = ("--warmup", "0", "--repeats", "2", "--rounds", "2", "--device", "cpu")
SMALL = (
    "--ops",
    "linear",
    "--shapes",
    "64x64",
    "40x64",
    "--rows",
    "3",
    "1",
    "--rotate-bytes",
    "100KB",
)


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
        "linear 64x64 M=1: read, 1 thread(s)",
        "linear rotated 64x64 M=1: torch float32",
        "linear rotated 64x64 M=1: torch bfloat16",
    ]
    assert all([len(times) for times in r["samples_s"]] == [2, 2] for r in results.values())
    rotated = results["linear rotated 40x64 M=3: int8, int8 activations"]
    assert rotated["details"]["num_sets"] == 38  # of 40 * 64 codes and 40 scales
    assert rotated["details"]["num_ops"] == 2 * 3 * 40 * 64
    assert rotated["details"]["num_bytes"] == 40 * 64 + 4 * 40 + 4 * 3 * (40 + 64)
    assert rotated["details"]["read_fraction"] > 0 and rotated["cpu_s"]["median"] > 0
    assert results["linear cached 40x64 M=3: int4"]["details"]["num_sets"] == 1
    assert "**linear rotated**" in capsys.readouterr().out


@pytest.mark.parametrize("built", [True, False])
def test_levels_case(
    built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each level by itself, torch's operations always, and more threads by the best alone."""
    if not built:
        info = replace(bminf.cpu_info(), level="none", library=None, reason="not compiled")
        monkeypatch.setattr(bminf, "cpu_info", lambda: info)
    cpu_products.levels.cache_clear()
    file, threads = tmp_path / "levels.json", torch.get_num_threads()
    shapes = ("--shapes", "64x32", "10x20", "--formats", "int4-g32", "--rotate-bytes", "100KB")
    assert run.main(["kernels", *QUICK, *shapes, "--threads", "2", "--out", str(file)]) == 0
    levels = [*cpu_products.levels()]
    cpu_products.levels.cache_clear()
    results = [r for r in json.loads(file.read_text())["results"] if "64x32" in r["name"]]
    assert levels[-1] == "none" and (built or levels == ["none"])
    assert [r["details"]["variant"] for r in results if r["details"].get("format")] == [
        f"int4-g32 {levels[0]}", f"int4-g32 {levels[0]}, 2 threads",
        *(f"int4-g32 {level}" for level in levels[1:]),
        *(o.name for o in OTHER_PRODUCTS if o.format == "int4-g32" and not o.obstacle((64, 32))),
    ]  # fmt: skip
    assert [r["details"]["threads"] for r in results if r["details"]["op"] == "read"] == [1, 2]
    assert all(r["failure"] is None and r["details"]["read_fraction"] > 0 for r in results)
    shown = capsys.readouterr().out
    assert "left out: torch _weight_int4pack_mm_for_cpu, 10x20 M=1: 10x20 is in no" in shown
    assert f"| int4-g32 {levels[0]}, 2 threads |" in shown
    assert torch.get_num_threads() == threads


def test_a_level_is_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was there before is there again."""
    asked: list[str] = []
    fakes = {name: lambda name=name: asked.append(name) for name in ("best", "none")}
    monkeypatch.setattr(cpu_products, "levels", lambda: fakes)
    rows = Rows(Inputs(Setup(CPU, torch.float32, (), (1,), ("int8",), 0), (8, 16)), "levels", 1)
    before = cpu_linear.kernels
    for call in cpu_products.level_calls(rows)[2:4]:
        asked.clear()
        (result,) = measure_calls([call], ONCE, CPU)
        assert result["failure"] is None and {*asked} == {result["details"]["level"]}
    assert cpu_linear.kernels is before


def test_every_kernel_is_checked_before_it_is_timed() -> None:
    formats = ("int8", "int4", "int4-g32-minimum")
    setup = Setup(CPU, torch.float16, ((16, 32),), (1, 32), formats, 0)
    launcher = NotingLauncher()
    results: list[Result] = []
    ops = [op for op in kernels.OPS if op not in kernels.CPU_OPS]
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
