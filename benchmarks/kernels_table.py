"""Tables and plots of the kernel benchmark, out of the content of its JSON files.

Nothing is measured or decided here; benchmarks.report puts the tables into the documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

Result = dict[str, Any]


def table(content: dict[str, Any]) -> str:
    """A caption, and a Markdown table for each op: sizes down, ways to compute across."""
    parts = [_caption(content)]
    for op, results in by_op(content).items():
        parts += [f"**{op}**", _op_table(results)]
        if content["parameters"]["device"] == "cuda" and has_plain(results):
            parts += [f"**{op}**, share of the copy's bandwidth:", _shares_table(results)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def by_op(content: dict[str, Any]) -> dict[str, list[Result]]:
    """The results that were measured, without the copies, in the order of the file."""
    found: dict[str, list[Result]] = {}
    for result in content["results"]:
        op = result["details"]["op"]
        if op != "copy" and result["time_s"] is not None:
            found.setdefault(op, []).append(result)
    return found


def size_of(result: Result) -> tuple[str, int | None]:
    """The weight's shape and the rows of activations."""
    details = result["details"]
    sides = (details["out_features"], details["in_features"])
    return "x".join(str(side) for side in sides if side is not None), details["rows"]


def by_size(results: Iterable[Result]) -> dict[tuple[str, int | None], dict[str, Result]]:
    """Size -> variant -> result."""
    found: dict[tuple[str, int | None], dict[str, Result]] = {}
    for result in results:
        found.setdefault(size_of(result), {})[result["details"]["variant"]] = result
    return found


def has_plain(results: Iterable[Result]) -> bool:
    return any(is_plain(result["details"]["variant"]) for result in results)


def is_plain(variant: str) -> bool:
    """Whether this is torch's product with a weight as it is, by whose time others are divided."""
    return variant in ("torch float32", "torch float16", "torch bfloat16")


def ratio(result: Result, others: dict[str, Result]) -> float | None:
    """The time of `result` over that of the first plain product of the same size."""
    for variant, plain in others.items():
        if is_plain(variant):
            quotient: float = result["time_s"]["median"] / plain["time_s"]["median"]
            return quotient
    return None


def _caption(content: dict[str, Any]) -> str:
    hardware, parameters = content["hardware"], content["parameters"]
    is_cuda = parameters["device"] == "cuda"
    device = hardware["gpu"]["name"] if is_cuda else f"{hardware['cpu']}, one thread"
    if not is_cuda and parameters["threads"] != 1:
        device = f"{hardware['cpu']}, {parameters['threads']} threads"
    copies = [result["gbps"] for result in content["results"] if result["details"]["op"] == "copy"]
    copy = sorted(filter(None, copies))[len(copies) // 2 - 1 :][:1]
    bandwidth = f"; copy {copy[0]:.0f} GB/s, read and written" if copy else ""
    return (
        f"{device}, torch {content['versions']['torch']}, {parameters['dtype']}{bandwidth}. "
        "Median in µs, and in parentheses that over torch's without quantisation, or where there "
        "is no such product the share of the copy's bandwidth. Bold: what the op chooses."
    )


def _op_table(results: list[Result]) -> str:
    variants = list(dict.fromkeys(result["details"]["variant"] for result in results))
    rows = [
        [shape, "" if num_rows is None else str(num_rows), *(_cell(v, found) for v in variants)]
        for (shape, num_rows), found in by_size(results).items()
    ]
    return markdown(["N x K", "M", *variants], rows)


def _cell(variant: str, found: dict[str, Result]) -> str:
    if variant not in found:
        return ""
    result = found[variant]
    over_plain = ratio(result, found)
    time = _digits(result["time_s"]["median"] * 1e6)
    if over_plain is None:
        text = f"{time} ({result['details'].get('copy_fraction', math.nan):.0%})"
    else:
        text = f"{time} ({over_plain:.2f})"
    return f"**{text}**" if result["details"].get("is_chosen") else text


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _shares_table(results: list[Result]) -> str:
    variants = list(dict.fromkeys(result["details"]["variant"] for result in results))
    rows = [
        [shape, str(num_rows), *(_share(v, found) for v in variants)]
        for (shape, num_rows), found in by_size(results).items()
        if num_rows in (1, 4, 16)
    ]
    return markdown(["N x K", "M", *variants], rows)


def _share(variant: str, found: dict[str, Result]) -> str:
    share = found[variant]["details"].get("copy_fraction") if variant in found else None
    return "" if share is None else f"{share:.0%}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def lines(content: dict[str, Any]) -> list[str]:
    """The times in a few lines of text: for each shape and variant, rows of activations:µs."""
    found = []
    for op, results in by_op(content).items():
        times: dict[str, list[str]] = {}
        for result in results:
            shape, num_rows = size_of(result)
            mark = "*" if result["details"].get("is_chosen") else ""
            time = f"{num_rows or ''}:{_digits(result['time_s']['median'] * 1e6)}{mark}"
            times.setdefault(f"{op} {shape} {result['details']['variant']}", []).append(time)
        found += [f"{name:46} {' '.join(each)}" for name, each in times.items()]
    return found


# ---- plots ---------------------------------------------------------------------------------------

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
_WIDTH, _HEIGHT = 230, 190  # of a panel, axes included
_LEFT, _TOP, _RIGHT, _BOTTOM = 34, 22, 10, 34  # between its border and its axes
_MOST = 8.0  # times torch's time, and as far below it: what lies beyond is drawn at the edge


@dataclass(frozen=True)
class _Panel:
    """One shape: for each variant its ratios by number of rows. left: of the whole picture."""

    title: str
    lines: dict[str, list[tuple[int, float]]]
    left: float

    def svg(self, colors: dict[str, str]) -> list[str]:
        parts = [*self._axes(), _text(self.left + _WIDTH / 2, 14, self.title, anchor="middle")]
        for variant, points in self.lines.items():
            where = " ".join(f"{self._x(m):.1f},{self._y(value):.1f}" for m, value in points)
            style = f'fill="none" stroke="{colors[variant]}" stroke-width="1.5"'
            parts.append(f'<polyline points="{where}" {style}/>')
        return parts

    def _rows(self) -> list[int]:
        return sorted({m for points in self.lines.values() for m, _ in points})

    def _x(self, num_rows: int) -> float:
        rows = self._rows()
        span = math.log2(rows[-1] / rows[0]) or 1.0
        share = math.log2(num_rows / rows[0]) / span
        return self.left + _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        power = math.log2(min(max(value, 1 / _MOST), _MOST)) / math.log2(_MOST)
        return _HEIGHT - _BOTTOM - (power + 1) / 2 * (_HEIGHT - _TOP - _BOTTOM)

    def _axes(self) -> list[str]:
        begin, end = self.left + _LEFT, self.left + _WIDTH - _RIGHT
        parts = []
        for value in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
            y = self._y(value)
            color = "#555" if value in (1 / _MOST, 1.0) else "#ddd"
            line = f'x1="{begin:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}"'
            parts.append(f'<line {line} stroke="{color}" stroke-width="0.7"/>')
            parts.append(_text(begin - 4, y + 3, f"{value:g}", anchor="end"))
        for num_rows in self._rows():
            parts.append(_text(self._x(num_rows), _HEIGHT - _BOTTOM + 13, str(num_rows), "middle"))
        return parts


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def plot(content: dict[str, Any], op: str) -> str:
    """An SVG picture: time over torch's by rows of activations, a panel for each shape."""
    sizes = by_size(by_op(content)[op])
    panels: list[_Panel] = []
    for shape in dict.fromkeys(shape for shape, _ in sizes):
        found = {m: variants for (own, m), variants in sizes.items() if own == shape}
        panels.append(_Panel(shape, _lines(found), _WIDTH * len(panels)))
    variants = list(dict.fromkeys(variant for panel in panels for variant in panel.lines))
    colors = {variant: _COLORS[i % len(_COLORS)] for i, variant in enumerate(variants)}
    parts = [part for panel in panels for part in panel.svg(colors)]
    for i, variant in enumerate(variants):
        parts += _key(variant, colors[variant], 8 + i % 4 * 230, _HEIGHT + 12 + i // 4 * 15)
    width, height = max(_WIDTH * len(panels), 930), _HEIGHT + 24 + (len(variants) - 1) // 4 * 15
    title = f"{op}: time over that of torch without quantisation, by rows of activations"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="10">\n<title>{escape(title)}</title>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _lines(found: dict[int | None, dict[str, Result]]) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for num_rows, variants in found.items():
        for variant, result in variants.items():
            over_plain = ratio(result, variants)
            if num_rows is not None and over_plain is not None:
                lines.setdefault(variant, []).append((num_rows, over_plain))
    return lines


def _key(variant: str, color: str, x: float, y: float) -> list[str]:
    line = f'x1="{x}" y1="{y - 3}" x2="{x + 18}" y2="{y - 3}"'
    return [f'<line {line} stroke="{color}" stroke-width="2"/>', _text(x + 23, y, variant)]
