"""What the tables of whole models have in common."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels_table import markdown
from bminf.units import format_bytes

Result = dict[str, Any]
Content = dict[str, Any]
"""Of a JSON file."""


@dataclass(frozen=True)
class Tables:
    """The two tables of a benchmark: what was measured, and what is predicted."""

    measured_head: list[str]
    measured_row: Callable[[Result], list[str]]
    caption: Callable[[Content, list[Result]], str]
    predicted_head: list[str]
    predicted_row: Callable[[Result], list[str]]
    predicted_caption: Callable[[list[Result]], str]

    def table(self, content: Content) -> str:
        """Captions and Markdown tables of one run."""
        measured, predicted = split(content["results"])
        parts = []
        if measured:
            rows = [self.measured_row(result) for result in measured]
            parts += [self.caption(content, measured), markdown(self.measured_head, rows)]
        rows = [self.predicted_row(result) for result in predicted]
        parts += [self.predicted_caption(predicted), markdown(self.predicted_head, rows)]
        return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"

    def lines(self, content: Content) -> list[str]:
        """The same rows as lines of text."""
        measured, predicted = split(content["results"])
        found = []
        if measured:
            found += aligned([self.measured_head, *map(self.measured_row, measured)])
        if predicted:
            found += ["", self.predicted_caption(predicted)]
            found += aligned([self.predicted_head, *map(self.predicted_row, predicted)])
        return found


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
