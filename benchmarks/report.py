"""`python -m benchmarks.report`: tables and plots in the documents, out of the JSON files.

Between the two comments `<!-- FILE.json -->` and `<!-- end -->` in one of DOCUMENTS stands the
table of benchmarks/results/FILE.json; PLOTS are whole files. Nobody types a number, and nothing is
measured here.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bminf.units import format_bytes

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/quantization.md", "docs/kernels.md", "benchmarks/README.md")
PLOTS = {"docs/kernels-cpu.svg": ("kernels-cpu.json", "linear rotated")}  # of which op
_MARKED = re.compile(r"<!-- (\S+\.json) -->\n.*?<!-- end -->", re.DOTALL)

Result = dict[str, Any]
Content = dict[str, Any]
"""Of a JSON file."""


def main() -> int:
    """0, after the tables in all documents, and the plots, were renewed."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name in PLOTS:
        (ROOT / name).write_text(plot_of(name), encoding="utf-8")
    return 0


def with_tables(text: str) -> str:
    """`text` with the table of each marked file in its place."""
    return _MARKED.sub(
        lambda mark: f"<!-- {mark[1]} -->\n{table(_content(mark[1]))}<!-- end -->", text
    )


def plot_of(name: str) -> str:
    """The picture that belongs into the file `name` of PLOTS."""
    file, op = PLOTS[name]
    return plot(_content(file), op)


def _content(name: str) -> Content:
    path = ROOT / "benchmarks" / "results" / name
    content: Content = json.loads(path.read_text(encoding="utf-8"))
    return content


def table(content: Content) -> str:
    """Captions and Markdown tables of one run."""
    parts = [part.rstrip("\n") for part in _PARTS[content["case"]](content)]
    return "\n\n".join(parts) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


Column = Callable[[Result], str]


def _by_columns(columns: dict[str, Column], results: Sequence[Result]) -> str:
    """A column that no result has anything for is left out."""
    cells = {head: [column(result) for result in results] for head, column in columns.items()}
    cells = {head: own for head, own in cells.items() if any(own)}
    return markdown(list(cells), zip(*cells.values(), strict=True))


def _digits(value: float) -> str:
    """Three of them, and all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _name(result: Result) -> str:
    return str(result["name"])


def _peak(result: Result) -> str:
    """Of the GPU where there is one."""
    nbytes = result["peak_cuda_bytes"] or result["peak_rss_anon_bytes"]
    return "" if nbytes is None else format_bytes(nbytes)


# ---- offload -------------------------------------------------------------------------------------


def _offload_parts(content: Content) -> Iterator[str]:
    """The median of each variant, per token."""
    hardware, parameters, results = (content[k] for k in ("hardware", "parameters", "results"))
    device = hardware["gpu"]["name"] if hardware["gpu"] else hardware["cpu"]
    yield (
        f"{parameters['model']}, {parameters['dtype']}, {parameters['tokens']} tokens, "
        f"{parameters['threads']} torch thread(s), {device}, {hardware['cores']} cores; "
        f"median of {len(results[0]['samples'])} runs:"
    )

    def ms(result: Result, name: str) -> str:
        return f"{result[name]['median'] / result['details']['tokens'] * 1e3:.1f}"

    plain_s = results[0]["cpu_s"]["median"]
    columns: dict[str, Column] = {
        "": _name,
        "ms / token": lambda result: ms(result, "wall_s"),
        "CPU ms / token": lambda result: ms(result, "cpu_s"),
        "CPU, plain = 1": lambda result: f"{result['cpu_s']['median'] / plain_s:.2f}",
        "peak memory": _peak,
    }
    yield _by_columns(columns, results)


# ---- perplexity ----------------------------------------------------------------------------------


def _perplexity_parts(content: Content) -> Iterator[str]:
    """Perplexity against fp32, and KL, of each format in the columns' own order and permuted."""
    parameters = content["parameters"]
    tokens = parameters["windows"] * parameters["window"]
    yield (
        f"{parameters['model']}, {parameters['weights'] / 1e6:.0f} M weights in "
        f"{parameters['linears']} linears, {tokens} tokens of text; "
        f"permuted: median (least to most) of {parameters['seeds']} orders:"
    )

    def own(key: str, digits: int) -> Column:
        return lambda result: f"{result['own_order'][key]['median']:.{digits}f}"

    def permuted(key: str) -> Column:
        return lambda result: _with_spread(result["permuted"][key])

    columns: dict[str, Column] = {
        "": _name,
        "bits / weight": lambda result: f"{result['bits_per_weight']:.3f}",
        "perplexity": own("perplexity", 3),
        "/ fp32": own("ratio", 4),
        "KL": own("kl", 4),
        "permuted, / fp32": permuted("ratio"),
        "permuted, KL": permuted("kl"),
    }
    yield _by_columns(columns, content["results"])


def _with_spread(values: dict[str, float]) -> str:
    least, median, most = (f"{values[key]:.3f}" for key in ("min", "median", "max"))
    return median if least == most else f"{median} ({least} to {most})"


# ---- zoo and glm ---------------------------------------------------------------------------------

PUBLISHED_S = {
    "encode": {
        "8 x A100, fp16, SAT": {512: 0.145, 1024: 0.250, 2048: 0.453},
        "4 x RTX 3090, int4, FT": {128: 0.374, 512: 1.3},
    },
    "decode": {
        "8 x A100, fp16, SAT": {512: 45.21, 1024: 89.00, 2048: 179.22},
        "4 x RTX 3090, int4, FT": {128: 8.16, 512: 32.3, 1024: 66.5, 2048: 150.0},
    },
}
"""Seconds that GLM-130B's authors publish, in their own code (SwissArmyTransformer) and in
FasterTransformer: task -> machine -> tokens -> seconds."""

_PUBLISHED = (
    "Published: by BMInf's authors, with 8-bit weights, batch 1, and as here no embedding, head or "
    'sampling. "At most": bytes are counted, and not what it takes to multiply many rows.'
)


def _model_parts(content: Content) -> Iterator[str]:
    """What was measured, if anything was, and what is predicted."""
    predicted = [result for result in content["results"] if "prediction" in result]
    measured = [result for result in content["results"] if "prediction" not in result]
    hardware, parameters = content["hardware"], content["parameters"]
    if measured:
        device = f"{hardware['cpu']}, {parameters['threads']} torch thread(s)"
        if parameters["device"] == "cuda":
            device = hardware["gpu"]["name"]
        lengths = ""
        if content["case"] == "zoo":  # whose tasks do not have them in their names
            lengths = "encoder: {prompt_length} tokens, decoder: {steps} steps; ".format(
                **parameters
            )
        yield (
            f"{parameters['model']}, random weights, {parameters['dtype']} but for what is packed; "
            f"{lengths}{device}; mean of {len(measured[0]['samples'])} runs:"
        )
        yield _by_columns(_MEASURED, measured)
    details = predicted[0]["details"]
    card = details["card"]
    yield (
        f"Predicted for all of {details['model']} on a {card['name']}: memory limit "
        f"{format_bytes(card['memory_limit'])}, link {card['link_bytes_per_s'] / 1e9:g} GB/s, "
        f"memory {card['memory_bytes_per_s'] / 1e9:g} GB/s. "
        f"{_PUBLISHED if any(map(_published_speeds, predicted)) else ''}"
    ).rstrip()
    yield _by_columns(_PREDICTED, predicted)


def _seconds(result: Result) -> float:
    """Of a run."""
    return statistics.fmean(sample["wall_s"] for sample in result["samples"])


def _detail(name: str, form: Callable[[float], str]) -> Column:
    """A number among the details, where it is known."""

    def cell(result: Result) -> str:
        value = result["details"].get(name)
        return "" if value is None else form(value)

    return cell


def _predicted(name: str, factor: float, word: str) -> Column:
    """A number with `word` before it where what is not predicted, multiplying, bounds it."""

    def cell(result: Result) -> str:
        number = _digits(result["prediction"][name] * factor)
        return f"{word} {number}" if result.get("is_bound") else number

    return cell


def _published_s(result: Result) -> str:
    details = result["details"]
    by_machine = PUBLISHED_S.get(details.get("task"), {})
    found = {name: known.get(details["length"]) for name, known in by_machine.items()}
    return "; ".join(f"{s:g} ({name})" for name, s in found.items() if s is not None)


def _published_speeds(result: Result) -> str:
    speeds = result.get("published_tokens_per_s", {})
    return ", ".join(f"{speed:g} ({version})" for version, speed in speeds.items())


def _blocks(result: Result) -> str:
    return f"{result['details']['resident']} + {result['details']['streamed']}"


_MEASURED: dict[str, Column] = {
    "": _name,
    "s": lambda result: _digits(_seconds(result)),
    "tokens / s": _detail("tokens_per_s", _digits),
    "ms / step": lambda result: _digits(_seconds(result) / result["details"]["steps"] * 1e3),
    "copied / step": _detail("copied_bytes_per_step", format_bytes),
    "link GB/s": _detail("link_gbps", _digits),
    "of the bound": _detail("fraction_of_bound", "{:.0%}".format),
    "blocks stay + stream": _blocks,
    "peak memory": _peak,
    "published s of all layers": _published_s,
}
_PREDICTED: dict[str, Column] = {
    "": _name,
    "tokens / s": _predicted("tokens_per_s", 1.0, "at most"),
    "ms / step": _predicted("pass_s", 1e3, "at least"),
    "copied / step": _detail("streamed_bytes_per_step", format_bytes),
    "link busy": lambda result: f"{result['prediction']['link_busy']:.0%}",
    "bound by": lambda result: str(result["prediction"].get("bound", "")),
    "blocks stay + stream": _blocks,
    "published tokens / s": _published_speeds,
}


# ---- kernels -------------------------------------------------------------------------------------


def _kernel_parts(content: Content) -> Iterator[str]:
    """A table for each op, sizes down, ways to compute across; then what failed, and targets."""
    yield _kernel_caption(content)
    for op, results in _by_op(content).items():
        yield f"**{op}**"
        yield _size_table(results, _time_cell, lambda rows: True)
        is_cuda = content["parameters"]["device"] == "cuda"
        if is_cuda and any(_is_plain(result["details"]["variant"]) for result in results):
            yield f"**{op}**, share of the copy's bandwidth:"
            yield _size_table(results, _share_cell, lambda rows: rows in (1, 4, 16))
    failed = [f"{result['name']}: {result['failure']}" for result in content["results"]
              if result["failure"]]  # fmt: skip
    for title, lines in (("Not measured:", failed), ("Targets:", targets(content))):
        if lines:
            yield title
            yield "".join(f"- {line}\n" for line in lines)


def _kernel_caption(content: Content) -> str:
    hardware, parameters = content["hardware"], content["parameters"]
    device, threads = hardware["cpu"], parameters["threads"]
    device += ", one thread" if threads == 1 else f", {threads} threads"
    if parameters["device"] == "cuda":
        device = hardware["gpu"]["name"]
    copies = [result["gbps"] for result in content["results"] if result["details"]["op"] == "copy"]
    copies = list(filter(None, copies))
    copy = f"; copy {statistics.median_low(copies):.0f} GB/s, read and written" if copies else ""
    return (
        f"{device}, torch {content['versions']['torch']}, {parameters['dtype']}{copy}. "
        "Median in µs, and in parentheses that over torch's without quantization, or where there "
        "is no such product the share of the copy's bandwidth. Bold: what the op chooses."
    )


Size = tuple[str, int | None]
"""The weight's shape and the rows of activations."""


def _by_op(content: Content) -> dict[str, list[Result]]:
    """The results that were measured, without the copies, in the order of the file."""
    found: dict[str, list[Result]] = {}
    for result in content["results"]:
        op = result["details"]["op"]
        if op != "copy" and result["time_s"] is not None:
            found.setdefault(op, []).append(result)
    return found


def _by_size(results: Iterable[Result]) -> dict[Size, dict[str, Result]]:
    """Size -> variant -> result."""
    found: dict[Size, dict[str, Result]] = {}
    for result in results:
        details = result["details"]
        sides = (details["out_features"], details["in_features"])
        shape = "x".join(str(side) for side in sides if side is not None)
        found.setdefault((shape, details["rows"]), {})[details["variant"]] = result
    return found


def _is_plain(variant: str) -> bool:
    """Whether this is torch's product with a weight as it is, by whose time others are divided."""
    return variant in ("torch float32", "torch float16", "torch bfloat16")


def _over_plain(result: Result, others: dict[str, Result]) -> float | None:
    """The time of `result` over that of the first plain product of the same size."""
    plain = next((own for variant, own in others.items() if _is_plain(variant)), None)
    return None if plain is None else result["time_s"]["median"] / plain["time_s"]["median"]


def _size_table(
    results: list[Result],
    cell: Callable[[Result, dict[str, Result]], str],
    is_shown: Callable[[int | None], bool],
) -> str:
    variants = list(dict.fromkeys(result["details"]["variant"] for result in results))
    rows = [
        [shape, str(num_rows or ""), *(cell(own[v], own) if v in own else "" for v in variants)]
        for (shape, num_rows), own in _by_size(results).items()
        if is_shown(num_rows)
    ]
    return markdown(["N x K", "M", *variants], rows)


def _time_cell(result: Result, others: dict[str, Result]) -> str:
    time, over_plain = _digits(result["time_s"]["median"] * 1e6), _over_plain(result, others)
    share = _share_cell(result, others) if over_plain is None else f"{over_plain:.2f}"
    text = f"{time} ({share})"
    return f"**{text}**" if result["details"].get("is_chosen") else text


def _share_cell(result: Result, _: dict[str, Result]) -> str:
    share = result["details"].get("copy_fraction")
    return "" if share is None else f"{share:.0%}"


def lines(content: Content) -> list[str]:
    """The times in a few lines of text: for each shape and variant, rows of activations:µs."""
    found = []
    for op, results in _by_op(content).items():
        times: dict[str, list[str]] = {}
        for (shape, num_rows), variants in _by_size(results).items():
            for variant, result in variants.items():
                mark = "*" if result["details"].get("is_chosen") else ""
                time = f"{num_rows or ''}:{_digits(result['time_s']['median'] * 1e6)}{mark}"
                times.setdefault(f"{op} {shape} {variant}", []).append(time)
        found += [f"{name:46} {' '.join(each)}" for name, each in times.items()]
    return found


# ---- what the kernels have to reach --------------------------------------------------------------

_LEAST_WEIGHT_BYTES = 100_000_000  # of a matrix that fills the memory of a large GPU
_LEAST_SHARE = {"int8": 0.85, "int4": 0.75}  # of the copy's bandwidth, for one row
_MOST_ROW_RATIO = {4: 1.2, 16: 1.3}  # rows: time over that of one row
_WAYS_OF_W8A8 = ("own kernel", "library", "torch._int_mm and torch")
_MOST_OVER_BEST = 1.03
_CPU_RATIOS = {  # op: variant, most over fp32, least number of weights
    "linear rotated": ("int8", 0.6, 576 * 576),
    "linear cached": ("int8, int8 activations", 0.5, 1536 * 576),
}


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


def targets(content: Content) -> list[Target]:
    """All targets for which the file has numbers."""
    ops = {op: _by_size(results) for op, results in _by_op(content).items()}
    return [
        *_weight_only_targets(ops.get("weight-only", {})),
        *_w8a8_targets(ops.get("w8a8", {})),
        *(target for op in _CPU_RATIOS for target in _cpu_targets(op, ops.get(op, {}))),
    ]


def _weight_only_targets(sizes: dict[Size, dict[str, Result]]) -> Iterator[Target]:
    """Matrices that fill the memory: one row reads codes and scales at the copy's speed, and a few
    rows cost hardly more."""
    for (shape, num_rows), variants in sizes.items():
        one_row = _chosen(sizes.get((shape, 1), {}))
        for format, chosen in _chosen(variants).items():
            details, name = chosen["details"], f"{format} {shape} M={num_rows}"
            if details["out_features"] * details["in_features"] < _LEAST_WEIGHT_BYTES:
                continue
            share, least = details.get("copy_fraction"), _LEAST_SHARE.get(format)
            if num_rows == 1 and least is not None and share is not None:
                yield Target(f"{name}, share of the copy", share, least, is_least=True)
            if num_rows in _MOST_ROW_RATIO and format in one_row:
                value = chosen["time_s"]["median"] / one_row[format]["time_s"]["median"]
                yield Target(f"{name} over M=1", value, _MOST_ROW_RATIO[num_rows])


def _chosen(variants: dict[str, Result]) -> dict[str, Result]:
    """Format -> the result of the path that the op takes."""
    details = [(result["details"], result) for result in variants.values()]
    return {own["format"]: result for own, result in details if own.get("is_chosen")}


def _w8a8_targets(sizes: dict[Size, dict[str, Result]]) -> Iterator[Target]:
    """The chosen product is the fastest one of codes that are there already."""
    for (shape, num_rows), variants in sizes.items():
        ways = [variants[name] for name in _WAYS_OF_W8A8 if name in variants]
        chosen = [way for way in ways if way["details"].get("is_chosen")]
        if num_rows == 2048 and chosen:
            best = min(way["time_s"]["median"] for way in ways)
            value = chosen[0]["time_s"]["median"] / best
            yield Target(f"w8a8 {shape} M=2048, chosen over best", value, _MOST_OVER_BEST)


def _cpu_targets(op: str, sizes: dict[Size, dict[str, Result]]) -> Iterator[Target]:
    """The least time over the least time: the machine's noise only ever adds."""
    variant, most, least_weights = _CPU_RATIOS[op]
    for (shape, num_rows), variants in sizes.items():
        sides = [int(side) for side in shape.split("x")]
        plain = next((own for name, own in variants.items() if _is_plain(name)), None)
        is_meant = num_rows == 1 and min(sides) >= 576 and math.prod(sides) >= least_weights
        if is_meant and plain is not None and variant in variants:
            value = variants[variant]["time_s"]["min"] / plain["time_s"]["min"]
            state = op.removeprefix("linear ")
            yield Target(f"CPU {variant} {shape} M=1 {state}, over fp32", value, most)


# ---- plots ---------------------------------------------------------------------------------------

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
_WIDTH, _HEIGHT = 230, 190  # of a panel, axes included
_LEFT, _TOP, _RIGHT, _BOTTOM = 34, 22, 10, 34  # between its border and its axes
_MOST = 8.0  # times torch's time, and as far below it: what lies beyond is drawn at the edge
_GRID = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def plot(content: Content, op: str) -> str:
    """An SVG picture: time over torch's by rows of activations, a panel for each shape."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for (shape, num_rows), found in _by_size(_by_op(content)[op]).items():
        for variant, result in found.items():
            points = panels.setdefault(shape, {}).setdefault(variant, [])
            value = _over_plain(result, found)
            if num_rows is not None and value is not None:
                points.append((num_rows, value))
    variants = list(dict.fromkeys(variant for panel in panels.values() for variant in panel))
    colors = {variant: _COLORS[i % len(_COLORS)] for i, variant in enumerate(variants)}
    parts = [part for i, (shape, panel) in enumerate(panels.items())
             for part in _panel(_WIDTH * i, shape, panel, colors)]  # fmt: skip
    for i, variant in enumerate(variants):
        x, y = 8 + i % 4 * 230, _HEIGHT + 12 + i // 4 * 15
        parts += [_line(x, y - 3, x + 18, y - 3, colors[variant], 2), _text(x + 23, y, variant)]
    width, height = max(_WIDTH * len(panels), 930), _HEIGHT + 24 + (len(variants) - 1) // 4 * 15
    title = f"{op}: time over that of torch without quantization, by rows of activations"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *parts,
        "</svg>\n",
    ])  # fmt: skip


def _panel(
    left: float, title: str, panel: dict[str, list[tuple[int, float]]], colors: dict[str, str]
) -> Iterator[str]:
    """One shape: for each variant its ratios by number of rows.   left: of the whole picture."""
    rows = sorted({num_rows for points in panel.values() for num_rows, _ in points})
    start, end = left + _LEFT, left + _WIDTH - _RIGHT
    span = math.log2(rows[-1] / rows[0]) or 1.0

    def x_of(num_rows: int) -> float:
        return start + math.log2(num_rows / rows[0]) / span * (end - start)

    for value in _GRID:
        y, color = _y_of(value), "#555" if value in (1 / _MOST, 1.0) else "#ddd"
        yield _line(start, y, end, y, color, 0.7)
        yield _text(start - 4, y + 3, f"{value:g}", "end")
    for num_rows in rows:
        yield _text(x_of(num_rows), _HEIGHT - _BOTTOM + 13, str(num_rows), "middle")
    yield _text(left + _WIDTH / 2, 14, title, "middle")
    for variant, points in panel.items():
        where = " ".join(f"{x_of(num_rows):.1f},{_y_of(value):.1f}" for num_rows, value in points)
        style = f'fill="none" stroke="{colors[variant]}" stroke-width="1.5"'
        yield f'<polyline points="{where}" {style}/>'


def _y_of(value: float) -> float:
    power = math.log2(min(max(value, 1 / _MOST), _MOST)) / math.log2(_MOST)
    return _HEIGHT - _BOTTOM - (power + 1) / 2 * (_HEIGHT - _TOP - _BOTTOM)


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


_PARTS: dict[str, Callable[[Content], Iterator[str]]] = {
    "offload": _offload_parts,
    "kernels": _kernel_parts,
    "zoo": _model_parts,
    "glm": _model_parts,
    "perplexity": _perplexity_parts,
}

if __name__ == "__main__":
    sys.exit(main())
