"""What the kernels have to reach, checked against the content of a JSON file of their benchmark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels_table import Result, by_op, by_size, is_plain

_LEAST_WEIGHT_BYTES = 100_000_000  # of a matrix that fills the memory of a large GPU
_LEAST_SHARE = {"int8": 0.85, "int4": 0.75}  # of the copy's bandwidth, for one row
_MOST_ROW_RATIO = {4: 1.2, 16: 1.3}  # rows: time over that of one row
_WAYS_OF_W8A8 = ("own kernel", "library", "torch._int_mm and torch")
_MOST_OVER_BEST = 1.03


@dataclass(frozen=True)
class Target:
    """One of them. limit: the least `value` if `is_least`, otherwise the most."""

    name: str
    value: float
    limit: float
    is_least: bool = False

    def is_met(self, margin: float = 1.0) -> bool:
        """Whether it is reached; with a margin of 1.5, whether two thirds of it are."""
        if self.is_least:
            return self.value * margin >= self.limit
        return self.value <= self.limit * margin

    def __str__(self) -> str:
        verdict = "reached" if self.is_met() else "MISSED"
        word = "least" if self.is_least else "most"
        return f"{self.name}: {self.value:.3f}, at {word} {self.limit:.2f}: {verdict}"


def targets(content: dict[str, Any]) -> list[Target]:
    """All targets for which the file has numbers."""
    ops = by_op(content)
    found: list[Target] = []
    for op, check in _CHECKS.items():
        found += check(ops.get(op, []))
    return found


def _bandwidth(results: list[Result]) -> Iterator[Target]:
    """One row, matrices that fill the memory: codes and scales are read at the copy's speed."""
    for (shape, num_rows), variants in by_size(results).items():
        for format, chosen in _chosen(variants).items():
            share = chosen["details"].get("copy_fraction")
            least = _LEAST_SHARE.get(format)
            if num_rows != 1 or least is None or share is None or not _is_large(chosen):
                continue
            yield Target(f"{format} {shape} M=1, share of the copy", share, least, is_least=True)


def _row_ratios(results: list[Result]) -> Iterator[Target]:
    """A few rows cost hardly more than one."""
    sizes = by_size(results)
    for (shape, num_rows), variants in sizes.items():
        one_row = _chosen(sizes.get((shape, 1), {}))
        for format, chosen in _chosen(variants).items():
            most = _MOST_ROW_RATIO.get(num_rows or 0)
            if most is None or format not in one_row or not _is_large(chosen):
                continue
            value = chosen["time_s"]["median"] / one_row[format]["time_s"]["median"]
            yield Target(f"{format} {shape} M={num_rows} over M=1", value, most)


def _weight_only(results: list[Result]) -> Iterator[Target]:
    yield from _bandwidth(results)
    yield from _row_ratios(results)


def _w8a8(results: list[Result]) -> Iterator[Target]:
    """The chosen product is the fastest one of codes that are there already."""
    for (shape, num_rows), variants in by_size(results).items():
        ways = [variants[name] for name in _WAYS_OF_W8A8 if name in variants]
        chosen = [way for way in ways if way["details"].get("is_chosen")]
        if num_rows != 2048 or not chosen:
            continue
        best = min(way["time_s"]["median"] for way in ways)
        value = chosen[0]["time_s"]["median"] / best
        yield Target(f"w8a8 {shape} M=2048, chosen over best", value, _MOST_OVER_BEST)


def _cpu_rotated(results: list[Result]) -> Iterator[Target]:
    yield from _cpu_ratios(results, "int8", "rotated", 0.6, 576 * 576)


def _cpu_cached(results: list[Result]) -> Iterator[Target]:
    yield from _cpu_ratios(results, "int8, int8 activations", "cached", 0.5, 1536 * 576)


def _cpu_ratios(
    results: list[Result], variant: str, state: str, most: float, least_weights: int
) -> Iterator[Target]:
    """The least time over the least time: the machine's noise only ever adds."""
    for (shape, num_rows), variants in by_size(results).items():
        sides = [int(side) for side in re.findall(r"\d+", shape)]
        is_meant = num_rows == 1 and min(sides) >= 576 and sides[0] * sides[1] >= least_weights
        plain = next((found for name, found in variants.items() if is_plain(name)), None)
        if is_meant and plain is not None and variant in variants:
            value = variants[variant]["time_s"]["min"] / plain["time_s"]["min"]
            yield Target(f"CPU {variant} {shape} M=1 {state}, over fp32", value, most)


_CHECKS = {
    "weight-only": _weight_only,
    "w8a8": _w8a8,
    "linear rotated": _cpu_rotated,
    "linear cached": _cpu_cached,
}


def _chosen(variants: dict[str, Result]) -> dict[str, Result]:
    """Format -> the result of the path that the op takes."""
    return {
        found["details"]["format"]: found
        for found in variants.values()
        if found["details"].get("is_chosen")
    }


def _is_large(result: Result) -> bool:
    details = result["details"]
    num_weights: int = details["out_features"] * details["in_features"]
    return num_weights >= _LEAST_WEIGHT_BYTES
