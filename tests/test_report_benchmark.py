"""Tables, plots and targets: what the documents show is what stands in the JSON files."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.report import (
    DOCUMENTS,
    PLOTS,
    ROOT,
    plot_of,
    read_result,
    table,
    with_tables,
)
from benchmarks.targets import Target, targets

BIG = (12288, 12288)
SPEED = "ms_per_token"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_shows_what_is_in_the_json_files(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert with_tables(page) == page


def test_the_documents_are_those_with_marks() -> None:
    assert {"README.md", "README-ZH.md", "docs/cards.md", "docs/kernels.md"} < set(DOCUMENTS)
    assert "CHANGELOG.md" not in DOCUMENTS


@pytest.mark.parametrize("name", PLOTS)
def test_a_picture_shows_what_is_in_the_json_file(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == plot_of(name)


def result(op: str, size: tuple[int, int, int], variant: str, us: float, **details: Any) -> Any:
    m, n, k = size
    time_s = {"min": us / 1e6, "median": us / 1e6, "max": us / 1e6, "spread": 0.0}
    sizes = {"rows": m, "out_features": n, "in_features": k}
    all_details = {"op": op, "variant": variant, "copy_fraction": 0.5} | sizes | details
    return {
        "name": f"{op} {variant}", "details": all_details, "time_s": time_s, "gbps": 100.0,
        "failure": None,
    }  # fmt: skip


def content(results: list[Any]) -> dict[str, Any]:
    return {
        "case": "kernels",
        "hardware": {"gpu": {"name": "A GPU"}, "cpu": "A CPU"},
        "versions": {"torch": "2.0"},
        "parameters": {"device": "cuda", "dtype": "float16", "threads": 1, "left_out": []},
        "results": results,
    }


def test_a_table_names_what_failed() -> None:
    failed = result("weight-only", (4, *BIG), "broken", 1.0)
    failed |= {"time_s": None, "failure": "KernelError: no"}
    shown = table(content([result("weight-only", (1, *BIG), "torch float16", 200.0), failed]))
    assert "- weight-only broken: KernelError: no" in shown


def offload(devices: list[str]) -> dict[str, Any]:
    """On each device a plain model, and a streamed one of twice the time."""
    results = [
        {
            "name": f"{device}: {name}", "samples": [{}], "details": {"tokens": 10},
            "wall_s": {"median": seconds}, "cpu_s": {"median": seconds},
            "peak_cuda_bytes": None, "peak_rss_anon_bytes": None,
        }
        for device, plain_s in (("cpu", 1.0), ("cuda", 0.1)) if device in devices
        for name, seconds in (("plain", plain_s), ("bminf", 2 * plain_s))
    ]  # fmt: skip
    own = {"devices": devices, "model": "random", "tokens": 10, "dtype": "float32", "threads": 1}
    return content(results) | {"case": "offload", "parameters": own}


def test_each_device_is_named_and_has_a_plain_model_of_its_own() -> None:
    both = table(offload(["cpu", "cuda"]))
    assert "A CPU, 1 torch thread(s) and A GPU; " in both
    assert both.count("| 1.00 |") == both.count("| 2.00 |") == 2
    assert "A GPU" not in table(offload(["cpu"])) and "A CPU" not in table(offload(["cuda"]))


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


def level(
    form: str, level: str, us: float, threads: int = 1, side: int = 4096, cpu_us: float = 0.0,
    share: float = 0.5,
) -> Any:  # fmt: skip
    variant = f"{form} {level}" + (f", {threads} threads" if threads > 1 else "")
    own = {
        "format": form,
        "level": level,
        "threads": threads,
        "read_fraction": share,
        "num_ops": 2 * side**2,
    }
    found = result("levels", (1, side, side), variant, us, **own)
    return found | {"cpu_s": {"median": (cpu_us or us) / 1e6}}


def test_targets_of_levels() -> None:
    results = [
        level("int8", "avx512", 600.0, share=0.9),
        level("int8", "avx512", 400.0, threads=2, share=0.7),
        level("int8", "none", 1200.0),
        level("int4-g32", "avx512", 500.0),
        level("int4-g32", "avx512", 250.0, threads=2, cpu_us=600.0),
        level("int4-g32", "avx2", 900.0, share=0.2),  # no target
        level("int4", "avx512", 600.0),
        level("int4", "none", 6000.0),
        level("int4-g32", "avx512", 50.0, side=1024),  # a sixteenth is 31.25
    ]
    assert [str(target) for target in targets(content(results))] == [
        "int8 avx512 4096x4096 M=1, share of reading: 0.900, at least 0.80: reached",
        "int8 avx512 4096x4096 M=1, torch's over it: 2.000, at least 1.80: reached",
        "int8 avx512, 2 threads 4096x4096 M=1, share of reading: 0.700, at least 0.75: MISSED",
        "int4-g32 avx512 4096x4096 M=1, share of reading: 0.500, at least 0.42: reached",
        "int4-g32 avx512, 2 threads 4096x4096 M=1, speed over one: 2.000, at least 1.50: reached",
        "int4-g32 avx512, 2 threads 4096x4096 M=1, CPU time over one: 1.200, at most 1.15: MISSED",
        "int4 avx512 4096x4096 M=1 over g32: 1.200, at most 1.35: reached",
        "int4 avx512 4096x4096 M=1, torch's over it: 10.000, at least 14.00: MISSED",
        "int4-g32 avx512 1024x1024 M=1, µs beyond its share of 4096: 18.750, at most 15.00: MISSED",
    ]


def test_one_thread_is_measured_in_its_cpu_time_and_more_on_the_wall() -> None:
    """Two sizes across, the ways down; and what reading takes in the caption."""
    read = level("read", "", 1000.0)
    read["details"] |= {"op": "read", "num_bytes": 25_000_000}
    read["name"] = "a group: read, 1 thread(s)"
    shown = table(content([
        read,
        level("int8", "avx2", 700.0, cpu_us=600.0, share=0.9),
        level("int8", "avx2", 400.0, threads=2, cpu_us=800.0, side=1024),
    ]))  # fmt: skip
    assert "; read, 1 thread(s): 25.0 GB/s" in shown
    assert "|  | 4096x4096 M=1 | 1024x1024 M=1 |" in shown
    assert "| int8 avx2 | 600 (90%) |  |" in shown
    assert "| int8 avx2, 2 threads |  | 400 (50%) |" in shown


def test_the_link_binds_wherever_weights_stream_as_the_page_says() -> None:
    cells = read_result("table-binds.json")["results"]
    fitting = [cell for cell in cells if cell["quantity"] == "pass_s" and cell["value"]]
    assert {int(cell["column"]) for cell in fitting} == {1, 8, 16, 32, 64, 128}
    others = [cell for cell in fitting if cell["details"]["binds"] != "link"]
    assert {cell["row"] for cell in others} == {"GLM-130B, int4, A100 80GB"}
    assert {cell["details"]["binds"] for cell in others} == {"device memory"}
    assert {int(cell["column"]) for cell in others} == {1, 8}  # a few texts
    until = [cell["value"] for cell in cells if cell["quantity"] == "rows_until_arithmetic"]
    assert 500 < min(until) and max(until) < 10_000


def test_a_token_of_sixteen_texts_takes_an_eighth_as_long_as_the_page_says() -> None:
    """Of one machine, as measured; tests/cli/test_tables.py counts passes and bytes."""
    cells = read_result("table-bloom-cpu.json")["results"]
    own = {c["column"]: c for c in cells if c["row"] == "bminf int8" and c["quantity"] == SPEED}
    one, many = own["1"], own["16"]
    assert one["kind"] == many["kind"] == "measured"
    assert one["details"]["resident"] == many["details"]["resident"] == 0
    assert many["value"] <= one["value"] / 8
