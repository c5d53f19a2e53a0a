"""What the tables of whole models have in common."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bminf.units import format_bytes

Result = dict[str, Any]


def split(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """What was measured, and what was predicted."""
    return (
        [result for result in results if "prediction" not in result],
        [result for result in results if "prediction" in result],
    )


def mean_s(result: Result) -> float:
    """Seconds of a run."""
    return statistics.fmean(sample["wall_s"] for sample in result["samples"])


def blocks(details: dict[str, Any]) -> str:
    return f"{details['resident']} + {details['streamed']}"


def peak(result: Result) -> str:
    """Of the GPU where there is one."""
    nbytes = result["peak_cuda_bytes"] or result["peak_rss_anon_bytes"]
    return "" if nbytes is None else format_bytes(nbytes)


def gbps(details: dict[str, Any]) -> str:
    return "" if details["link_gbps"] is None else f"{details['link_gbps']:.1f}"


def device(content: dict[str, Any]) -> str:
    """What was measured on."""
    hardware, parameters = content["hardware"], content["parameters"]
    if parameters["device"] == "cuda":
        return str(hardware["gpu"]["name"])
    return f"{hardware['cpu']}, {parameters['threads']} torch thread(s)"


def card(details: dict[str, Any]) -> str:
    """Of a prediction."""
    given = details["card"]
    return (
        f"{given['name']}: memory limit {format_bytes(given['memory_limit'])}, link "
        f"{given['link_bytes_per_s'] / 1e9:g} GB/s, "
        f"memory {given['memory_bytes_per_s'] / 1e9:g} GB/s"
    )


def aligned(rows: Sequence[list[str]]) -> list[str]:
    """Rows as lines of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
