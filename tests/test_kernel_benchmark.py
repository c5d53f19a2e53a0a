"""The kernel benchmark runs: calls are checked, then timed by turns; tables follow the file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as in test_benchmarks.py
sys.path.append(str(Path(__file__).resolve().parent / "kernels"))

from host_launcher import served_by

from benchmarks import kernels_cuda, kernels_table, run
from benchmarks.calls import Call, CallResult, measure_calls, num_sets, relative_error
from benchmarks.harness import Settings
from benchmarks.kernels_inputs import Group, Setup
from benchmarks.kernels_targets import Target, targets
from benchmarks.report import DOCUMENTS, PLOTS, ROOT, plot_of, with_tables

CPU = torch.device("cpu")
ONCE = Settings(warmup=0, repeats=1, rounds=1)
QUICK = ("--warmup", "0", "--repeats", "2", "--rounds", "2", "--device", "cpu")
SMALL = ("--shapes", "64x64", "40x64", "--rows", "3", "1", "--rotate-bytes", "100KB")


def call(name: str, run: Callable[[int], Any], error: float = 0.0, num_sets: int = 1) -> Call:
    return Call(name, run, num_sets, lambda value: error, 0.1, num_bytes=100, num_ops=10)


# ---- calls ---------------------------------------------------------------------------------------


def test_calls_take_turns_and_their_sets_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.calls._LEAST_SAMPLE_S", 0.0)  # so a sample is one call
    log: list[str] = []
    calls = [call(name, lambda i, n=name: log.append(f"{n}{i}"), num_sets=3) for name in "ab"]
    results = measure_calls(calls, Settings(warmup=1, repeats=2, rounds=2), CPU)
    check_and_estimate = ["a0", "a0", "b0", "b0"]
    rounds = ["a1", "a2", "a0", "b1", "b2", "b0"] * 2
    assert log == check_and_estimate + rounds
    assert [[len(times) for times in result.samples_s] for result in results] == [[2, 2]] * 2


def test_what_is_wrong_or_fails_is_not_timed_and_says_why() -> None:
    def fail(_: int) -> None:
        raise ValueError("no such kernel")

    log: list[int] = []
    calls = [call("wrong", log.append, error=0.2), call("broken", fail), call("right", id)]
    wrong, broken, right = (result.as_json() for result in measure_calls(calls, ONCE, CPU))
    assert log == [0]
    assert wrong["failure"] == "ArithmeticError: relative error 0.2, at most 0.1"
    assert broken["failure"] == "ValueError: no such kernel"
    assert wrong["time_s"] is broken["time_s"] is None and not wrong["samples_s"]
    assert right["failure"] is None and right["gbps"] > 0 and right["tops"] > 0


def test_what_is_not_written_is_wrong() -> None:
    expected = torch.zeros(1000)
    found: list[bool] = []
    for dtype in (torch.float16, torch.float32):
        unwritten = Call(
            "unwritten",
            lambda _, dtype=dtype: torch.empty(1000, dtype=dtype),
            1,
            lambda value: relative_error(value, expected),
            0.1,
            1,
        )
        (result,) = measure_calls([unwritten], ONCE, CPU)
        found.append(result.error == float("inf"))
    assert found == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_enough_sets_for_the_bytes_between_two_uses() -> None:
    assert num_sets(100, 0) == 1
    assert [num_sets(100, size) for size in (1, 100, 101)] == [2, 2, 3]


# ---- the case ------------------------------------------------------------------------------------


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
        "linear 64x64 M=1: copy",
        "linear rotated 64x64 M=1: torch float32",
        "linear rotated 64x64 M=1: torch bfloat16",
    ]
    assert all([len(times) for times in r["samples_s"]] == [2, 2] for r in results.values())
    rotated = results["linear rotated 40x64 M=3: int8, int8 activations"]
    assert rotated["details"]["num_sets"] == 38  # of 40 * 64 codes and 40 scales
    assert rotated["details"]["num_ops"] == 2 * 3 * 40 * 64
    assert rotated["details"]["copy_fraction"] > 0
    assert results["linear cached 40x64 M=3: int4"]["details"]["num_sets"] == 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)


def test_groups_are_left_out_when_the_time_is_over(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    run.main(["kernels", *QUICK, *SMALL, "--seconds", "0", "--out", str(file)])
    content = json.loads(file.read_text())
    assert content["results"] == []
    assert content["parameters"]["left_out"][0] == "linear 64x64 M=1"


@pytest.mark.parametrize("num_groups", [0, 1, 3])
def test_a_stopped_run_leaves_what_it_measured_and_names_the_rest(
    num_groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, measured = tmp_path / "kernels.json", list[str]()

    def stopped_later(group: Group, settings: Settings) -> list[CallResult]:
        if len(measured) == num_groups:
            raise KeyboardInterrupt
        measured.append(group.name)
        return [CallResult(f"{group.name}: toy", {"op": "linear"})]

    monkeypatch.setattr("benchmarks.kernels.measure", stopped_later)
    with pytest.raises(KeyboardInterrupt):
        run.main(["kernels", *QUICK, *SMALL, "--out", str(file)])
    content = json.loads(file.read_text())
    assert [result["name"] for result in content["results"]] == [f"{n}: toy" for n in measured]
    names = [f"linear {n}x64 M={m}" for n in (64, 40) for m in (1, 3)]
    assert measured + content["parameters"]["left_out"] == names


@pytest.mark.parametrize("arguments", [("--shapes", "64"), ("--ops", "gated"), ("--rows", "x")])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        run.main(["kernels", *QUICK, *arguments])


class _DoesNothing:
    """A launcher whose kernels write nothing."""

    capability, num_processors = 80, 1

    def __init__(self) -> None:
        self.launched: set[str] = set()

    def launch(self, kernel: Any, *_: Any) -> None:
        self.launched.add(kernel.name)


def test_every_kernel_is_checked_before_it_is_timed() -> None:
    setup = Setup(CPU, torch.float16, ((16, 32),), (1, 32), ("int8", "int4"), 0, 16)
    launcher = _DoesNothing()
    results: list[CallResult] = []
    with served_by(launcher):
        for groups in kernels_cuda.OPS.values():
            for group in groups(setup):
                results += measure_calls(group.calls(), ONCE, CPU)
    timed = {result.details["variant"] for result in results if result.failure is None}
    assert timed == {"torch float16", "torch: quantize_rows", "torch: rms_norm_quantize"}
    reasons = {result.failure.partition(":")[0] for result in results if result.failure}
    assert reasons == {"ArithmeticError"}  # they ran, and what they gave was wrong
    assert launcher.launched == {
        "linear_few_rows",
        "linear_tensor_core",
        "dequantize",
        "quantize_rows",
        "rms_norm_quantize",
        "gemm_w8a8_tensor_core",
        "scale_int32",
    }


# ---- tables, plots, targets ----------------------------------------------------------------------


def result(op: str, size: tuple[int, int, int], variant: str, us: float, **details: Any) -> Any:
    m, n, k = size
    time_s = {"min": us / 1e6, "median": us / 1e6, "max": us / 1e6, "spread": 0.0}
    sizes = {"rows": m, "out_features": n, "in_features": k}
    all_details = {"op": op, "variant": variant, "copy_fraction": 0.5} | sizes | details
    return {"details": all_details, "time_s": time_s, "gbps": 100.0, "failure": None}


def content(results: list[Any], device: str = "cuda") -> dict[str, Any]:
    return {
        "case": "kernels",
        "hardware": {"gpu": {"name": "A GPU"}, "cpu": "A CPU"},
        "versions": {"torch": "2.0"},
        "parameters": {"device": device, "dtype": "float16", "threads": 1, "left_out": []},
        "results": results,
    }


BIG = (12288, 12288)


def test_table_and_lines() -> None:
    results = [
        result("copy", (1, 1, 1), "copy", 1.0),
        result("weight-only", (1, *BIG), "torch float16", 200.0),
        result("weight-only", (1, *BIG), "int8 few rows", 100.0, is_chosen=True, format="int8"),
        result("weight-only", (4, *BIG), "torch float16", 50.0),
        result("rows", (4, 7, 8), "quantize_rows", 5.0),
        result("weight-only", (4, *BIG), "broken", 1.0) | {"time_s": None},
    ]
    text = kernels_table.table(content(results))
    assert "| 12288x12288 | 1 | 200 (1.00) | **100 (0.50)** |" in text
    assert "| 12288x12288 | 4 | 50.0 (1.00) |  |" in text
    assert "| 7x8 | 4 | 5.0 (50%) |" in text
    assert "A GPU" in text and "broken" not in text
    lines = kernels_table.lines(content(results))
    assert [line.split() for line in lines][1] == [
        "weight-only", "12288x12288", "int8", "few", "rows", "1:100*",
    ]  # fmt: skip


def test_plot_is_a_picture() -> None:
    variants = [("torch float16", 10.0), ("a < b", 5.0)]
    results = [
        result("weight-only", (m, n, 64), variant, us * m)
        for m in (1, 16)
        for n in (64, 128)
        for variant, us in variants
    ]
    picture = ElementTree.fromstring(kernels_table.plot(content(results), "weight-only"))
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4 and all(len(line.get("points", "").split()) == 2 for line in lines)


def test_targets() -> None:
    chosen = {"is_chosen": True, "format": "int8"}
    results = [
        result("weight-only", (1, *BIG), "int8 few rows", 100.0, **chosen, copy_fraction=0.86),
        result("weight-only", (4, *BIG), "int8 few rows", 110.0),
        result("weight-only", (4, *BIG), "int8 tensor cores", 121.0, **chosen),
        result("weight-only", (1, 4096, 4096), "int8 few rows", 9.0, **chosen),  # too small
        result("w8a8", (2048, *BIG), "own kernel", 100.0),
        result("w8a8", (2048, *BIG), "library", 105.0, **chosen),
        result("linear rotated", (1, 576, 576), "torch float32", 10.0),
        result("linear rotated", (1, 576, 576), "int8", 5.0),
    ]
    assert [str(target) for target in targets(content(results))] == [
        "int8 12288x12288 M=1, share of the copy: 0.860, at least 0.85: reached",
        "int8 12288x12288 M=4 over M=1: 1.210, at most 1.20: MISSED",
        "w8a8 12288x12288 M=2048, chosen over best: 1.050, at most 1.03: MISSED",
        "CPU int8 576x576 M=1 rotated, over fp32: 0.500, at most 0.60: reached",
    ]
    assert Target("speed", 0.6, 0.85, is_least=True).is_met(margin=1.5)
    assert not Target("time", 2.0, 1.2).is_met(margin=1.5)


def test_the_documents_show_what_is_in_the_json_files() -> None:
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    assert "docs/kernels.md" in DOCUMENTS and "<!-- kernels-cpu.json -->" in page
    assert with_tables(page) == page
    for name in PLOTS:
        assert (ROOT / name).read_text(encoding="utf-8") == plot_of(name)
