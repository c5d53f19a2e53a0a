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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from bminf.cli.tables import text
from bminf.cli.tables.published import published
from bminf.cli.tables.text import digits, markdown
from bminf.units import format_bytes

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    *("README.md", "docs/quantization.md", "docs/kernels.md", "docs/tables.md"),
    "benchmarks/README.md",
)
PLOTS = {  # of which op, or of which numbers of a table
    "docs/kernels-cpu.svg": ("kernels-cpu.json", "linear rotated"),
    "docs/table-bloom-cpu.svg": ("table-bloom-cpu.json", "ms_per_token"),
}
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
        lambda mark: f"<!-- {mark[1]} -->\n{table(read_result(mark[1]))}<!-- end -->", text
    )


def plot_of(name: str) -> str:
    """The picture that belongs into the file `name` of PLOTS."""
    file, what = PLOTS[name]
    content = read_result(file)
    return table_plot(content, what) if content["case"] == "table" else plot(content, what)


def read_result(name: str) -> Content:
    """The content of a file in benchmarks/results."""
    path = ROOT / "benchmarks" / "results" / name
    content: Content = json.loads(path.read_text(encoding="utf-8"))
    return content


def table(content: Content) -> str:
    """Captions and Markdown tables of one run."""
    parts = [part.rstrip() for part in _PARTS[content["case"]](content)]
    return "\n\n".join(parts) + "\n"


Column = Callable[[Result], str]


def by_columns(columns: dict[str, Column], results: Sequence[Result]) -> str:
    """The name of each result, and its columns; one that no result has anything for is left out."""
    columns = {"": at("name"), **columns}
    cells = {head: [column(result) for result in results] for head, column in columns.items()}
    cells = {head: own for head, own in cells.items() if any(own)}
    return markdown(list(cells), zip(*cells.values(), strict=True))


def at(path: str, form: Callable[[Any], str] = str) -> Column:
    """What stands at a path such as "details.tokens", where it is known."""

    def cell(result: Result) -> str:
        value: Any = result
        for key in path.split("."):
            value = None if value is None else value.get(key)
        return "" if value is None else form(value)

    return cell


def _device(content: Content) -> str:
    """What was measured on: one device, or several by turns."""
    hardware, parameters = content["hardware"], content["parameters"]
    cpu = f"{hardware['cpu']}, {parameters['threads']} torch thread(s)"
    kinds = parameters["devices"] if "devices" in parameters else [parameters["device"]]
    return " and ".join(cpu if kind == "cpu" else hardware["gpu"]["name"] for kind in kinds)


def _peak(result: Result) -> str:
    """Of the GPU where there is one."""
    nbytes = result["peak_cuda_bytes"] or result["peak_rss_anon_bytes"]
    return "" if nbytes is None else format_bytes(nbytes)


# ---- offload and perplexity ----------------------------------------------------------------------


def _offload_parts(content: Content) -> Iterator[str]:
    """The median of each variant, per token."""
    parameters, results = content["parameters"], content["results"]
    yield (
        f"{parameters['model']}, {parameters['dtype']}, {parameters['tokens']} tokens, "
        f"{_device(content)}; median of {len(results[0]['samples'])} runs:"
    )
    plain = {r["name"].partition(":")[0]: r for r in results if r["name"].endswith(": plain")}

    def over_plain(result: Result) -> str:
        """That of the same device."""
        own = plain[result["name"].partition(":")[0]]
        return f"{result['cpu_s']['median'] / own['cpu_s']['median']:.2f}"

    def ms(median_s: float) -> str:
        return f"{median_s / parameters['tokens'] * 1e3:.1f}"

    columns = {"ms / token": at("wall_s.median", ms), "CPU ms / token": at("cpu_s.median", ms)}
    yield by_columns(columns | {"CPU, plain = 1": over_plain, "peak memory": _peak}, results)


def _perplexity_parts(content: Content) -> Iterator[str]:
    from tools.perplexity import table_parts  # which imports torch

    return table_parts(content)


# ---- zoo and glm ---------------------------------------------------------------------------------


def _model_parts(content: Content) -> Iterator[str]:
    """What was measured, if anything was, and what is predicted."""
    predicted = [result for result in content["results"] if "prediction" in result]
    measured = [result for result in content["results"] if "prediction" not in result]
    parameters, lengths = content["parameters"], ""
    if measured:
        if "steps" in parameters:  # of a file from when tasks had no lengths in their names
            lengths = "encoder: {prompt_length} tokens, decoder: {steps} steps; "
        yield (
            f"{parameters['model']}, random weights, {parameters['dtype']} but for what is packed; "
            f"{lengths.format(**parameters)}{_device(content)}; "
            f"mean of {len(measured[0]['samples'])} runs:"
        )
        yield by_columns(_MEASURED, measured)
    details = predicted[0]["details"]
    card, is_published = details["card"], any(r.get("published_tokens_per_s") for r in predicted)
    caption = published()["tokens_per_s"]["caption"] if is_published else ""
    yield (
        f"Predicted for all of {details['model']} on a {card['name']}: memory limit "
        f"{format_bytes(card['memory_limit'])}, link {card['link_bytes_per_s'] / 1e9:g} GB/s, "
        f"memory {card['memory_bytes_per_s'] / 1e9:g} GB/s. {caption}"
    )
    yield by_columns(_PREDICTED, predicted)


def _predicted(name: str, factor: float, word: str) -> Column:
    """A number with `word` before it where what is not predicted, multiplying, bounds it."""

    def cell(result: Result) -> str:
        number = digits(result["prediction"][name] * factor)
        return f"{word} {number}" if result.get("is_bound") else number

    return cell


def _published_s(details: dict[str, Any]) -> str:
    """Seconds that GLM-130B's authors publish."""
    by_machine = published()["seconds"].get(details.get("task"), {})
    found = {name: known.get(str(details["length"])) for name, known in by_machine.items()}
    return "; ".join(f"{s:g} ({name})" for name, s in found.items() if s is not None)


def _blocks(details: dict[str, Any]) -> str:
    return f"{details['resident']} + {details['streamed']}"


_MEASURED: dict[str, Column] = {
    "s": at("details", lambda own: digits(own["tokens"] / own["tokens_per_s"])),
    "tokens / s": at("details.tokens_per_s", digits),
    "ms / step": at(
        "details", lambda own: digits(own["tokens"] / own["tokens_per_s"] / own["steps"] * 1e3)
    ),
    "copied / step": at("details.copied_bytes_per_step", format_bytes),
    "link GB/s": at("details.link_gbps", digits),
    "of the bound": at("details.fraction_of_bound", "{:.0%}".format),
    "blocks stay + stream": at("details", _blocks),
    "peak memory": _peak,
    "published s of all layers": at("details", _published_s),
}
_PREDICTED: dict[str, Column] = {
    "tokens / s": _predicted("tokens_per_s", 1.0, "at most"),
    "ms / step": _predicted("pass_s", 1e3, "at least"),
    "copied / step": at("details.streamed_bytes_per_step", format_bytes),
    "link busy": at("prediction.link_busy", "{:.0%}".format),
    "bound by": at("prediction.bound"),
    "blocks stay + stream": at("details", _blocks),
    "published tokens / s": at(
        "published_tokens_per_s",
        lambda speeds: ", ".join(f"{speed:g} ({version})" for version, speed in speeds.items()),
    ),
}


# ---- kernels -------------------------------------------------------------------------------------

Size = tuple[str, int]
"""The weight's shape and the rows of activations."""
Variants = dict[str, Result]
"""Of one size, by the way to compute."""
_PLAIN = ("torch float32", "torch float16", "torch bfloat16")  # by whose time others are divided


def _kernel_parts(content: Content) -> Iterator[str]:
    """A table for each op, sizes down, ways to compute across; then what failed, and targets."""
    yield (
        f"{_device(content)}, torch {content['versions']['torch']}, "
        f"{content['parameters']['dtype']}{_bandwidth(content)}. "
        "Median in µs, and in parentheses that over torch's without quantization, or where there "
        "is no such product the share of the copy's bandwidth. Bold: what the op chooses."
    )
    for op, sizes in _by_op(content).items():
        yield f"**{op}**"
        rows = [
            [shape, str(num_rows), *(_time_cell(name, variants) for name in _ways(sizes))]
            for (shape, num_rows), variants in sizes.items()
        ]
        yield markdown(["N x K", "M", *_ways(sizes)], rows)
    failed = [f"{r['name']}: {r['failure']}" for r in content["results"] if r["failure"]]
    for title, lines in (("Not measured:", failed), ("Targets:", targets(content))):
        if lines:
            yield title
            yield "".join(f"- {line}\n" for line in lines)


_BANDWIDTHS = {"copy": "copy {:.0f} GB/s, read and written", "read": "{:.1f} GB/s read"}
"""How that of the memory was measured: what is said of it."""


def _bandwidth(content: Content) -> str:
    """What the file says of that of the memory."""
    said = ""
    for op, words in _BANDWIDTHS.items():
        found = [r["gbps"] for r in content["results"] if r["details"]["op"] == op and r["gbps"]]
        said += f"; {words.format(statistics.median_low(found))}" if found else ""
    return said


def _by_op(content: Content) -> dict[str, dict[Size, Variants]]:
    """Op -> size -> way to compute -> result, of what was measured, without the bandwidths."""
    found: dict[str, dict[Size, Variants]] = {}
    for result in content["results"]:
        details = result["details"]
        if details["op"] not in _BANDWIDTHS and result["time_s"] is not None:
            shape = f"{details['out_features']}x{details['in_features']}"
            sizes = found.setdefault(details["op"], {})
            sizes.setdefault((shape, details["rows"]), {})[details["variant"]] = result
    return found


def _ways(sizes: dict[Size, Variants]) -> list[str]:
    """All ways to compute, in the order of the file."""
    return list(dict.fromkeys(name for variants in sizes.values() for name in variants))


def _over_plain(name: str, variants: Variants, key: str = "median") -> float | None:
    """The time over that of torch's product with the weight as it is; None without one of them."""
    plain = next((own for other, own in variants.items() if other in _PLAIN), None)
    return _ratio(variants[name], plain, key) if plain and name in variants else None


def _ratio(one: Result, other: Result, key: str = "median") -> float:
    """Of their times."""
    ratio: float = one["time_s"][key] / other["time_s"][key]
    return ratio


def _time_cell(name: str, variants: Variants) -> str:
    if name not in variants:
        return ""
    details, over_plain = variants[name]["details"], _over_plain(name, variants)
    share = details.get("copy_fraction", math.nan)  # where the copy failed, nobody knows
    compared = f"{share:.0%}" if over_plain is None else f"{over_plain:.2f}"
    text = f"{digits(variants[name]['time_s']['median'] * 1e6)} ({compared})"
    return f"**{text}**" if details.get("is_chosen") else text


# ---- what the kernels have to reach --------------------------------------------------------------

_LEAST_WEIGHTS = 100_000_000  # of a matrix that fills the memory of a large GPU
_LEAST_SHARE = {"int8": 0.85, "int4": 0.75}  # of the copy's bandwidth, for one row
_LEAST_READ = {"int8": 0.8, "int4-g32": 0.42}  # of the bandwidth of reading, for one row on one CPU
_LEAST_READ_WEIGHTS = 4096 * 4096
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
    return [
        target
        for op, sizes in _by_op(content).items()
        for size in sizes
        for target in _targets_of(op, size, sizes)
    ]


def _targets_of(op: str, size: Size, sizes: dict[Size, Variants]) -> Iterator[Target]:
    (shape, num_rows), variants, chosen = size, sizes[size], _chosen(sizes[size])
    name, num_weights = f"{shape} M={num_rows}", math.prod(map(int, shape.split("x")))
    if op in _CPU_RATIOS and num_rows == 1:
        way, most, least_weights = _CPU_RATIOS[op]
        # The least time over the least time: the machine's noise only ever adds.
        ratio = _over_plain(way, variants, "min")
        if ratio is not None and num_weights >= least_weights:
            yield Target(f"CPU {way} {name} {op.split()[1]}, over fp32", ratio, most)
        if op == "linear rotated" and num_weights >= _LEAST_READ_WEIGHTS:
            for form, least in _LEAST_READ.items():
                share = variants.get(form, {"details": {}})["details"].get("read_fraction")
                if share is not None:
                    yield Target(f"CPU {form} {name}, share of reading", share, least, True)
    elif op == "w8a8" and num_rows == 2048:
        # The chosen product is the fastest one of codes that are there already.
        ways = [variants[way] for way in _WAYS_OF_W8A8 if way in variants]
        for own in chosen.values():
            worst = max(_ratio(own, other) for other in ways)
            yield Target(f"w8a8 {name}, chosen over best", worst, _MOST_OVER_BEST)
    elif op == "weight-only" and num_weights >= _LEAST_WEIGHTS:
        # One row reads codes and scales at the copy's speed, and a few rows cost hardly more.
        one_row = _chosen(sizes.get((shape, 1), {}))
        for form, own in chosen.items():
            share = own["details"].get("copy_fraction")
            if num_rows == 1 and form in _LEAST_SHARE and share is not None:
                least = _LEAST_SHARE[form]
                yield Target(f"{form} {name}, share of the copy", share, least, is_least=True)
            if num_rows in _MOST_ROW_RATIO and form in one_row:
                most = _MOST_ROW_RATIO[num_rows]
                yield Target(f"{form} {name} over M=1", _ratio(own, one_row[form]), most)


def _chosen(variants: Variants) -> Variants:
    """Format -> the result of the path that the op takes."""
    chosen = [result for result in variants.values() if result["details"].get("is_chosen")]
    return {result["details"]["format"]: result for result in chosen}


# ---- plots ---------------------------------------------------------------------------------------

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
_STEP_X, _STEP_Y = 26, 22  # for twice the rows, and for twice the time
_MOST = 3  # doublings of torch's time, and halvings: what lies beyond is drawn at the edge
_MARGIN, _HEIGHT = 44, 200


def plot(content: Content, op: str) -> str:
    """An SVG picture: time over torch's by rows of activations, a panel for each shape."""
    sizes = _by_op(content)[op]
    shapes = dict.fromkeys(shape for shape, _ in sizes)
    colors = dict(zip(_ways(sizes), cycle(_COLORS), strict=False))
    width = round(_STEP_X * math.log2(max(num_rows for _, num_rows in sizes)))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="10" '
        f'viewBox="0 0 {(width + _MARGIN) * len(shapes)} {_HEIGHT}">',
        f"<title>{op}: time over that of torch without quantization, by rows</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, shape in enumerate(shapes):
        x, own = (
            (width + _MARGIN) * i,
            {m: each for (one, m), each in sizes.items() if one == shape},
        )
        lines.append(f'<g transform="translate({x + _MARGIN - 8} {_HEIGHT / 2 - 10})">')
        lines += [_text(width / 2, -_STEP_Y * _MOST - 8, "middle", shape)]
        lines += [*_panel(width, own, colors), "</g>"]
    names = [f'<tspan fill="{color}">■ {name}</tspan>' for name, color in colors.items()]
    lines.append(_text(8, _HEIGHT - 6, "start", "&#160; ".join(names)))
    return "\n".join([*lines, "</svg>\n"])


def _panel(width: int, by_rows: dict[int, Variants], colors: dict[str, str]) -> Iterator[str]:
    """For each variant its ratios by rows; one row in torch's time is at (0, 0)."""
    for power in range(-_MOST, _MOST + 1):
        y = -_STEP_Y * power
        yield f'<path d="M0 {y}h{width}" stroke="{"#ddd" if power else "#555"}"/>'
        yield _text(-4, y + 3, "end", f"{2.0**power:g}")
    for num_rows in by_rows:
        x = _STEP_X * math.log2(num_rows)
        yield _text(x, _STEP_Y * _MOST + 13, "middle", str(num_rows))
    for name, color in colors.items():
        points = []
        for num_rows, variants in by_rows.items():
            ratio = _over_plain(name, variants)
            if ratio is not None:
                power = min(max(math.log2(ratio), -_MOST), _MOST)
                points.append(f"{_STEP_X * math.log2(num_rows):.1f},{-_STEP_Y * power:.1f}")
        yield f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}"/>'


def _text(x: float, y: float, anchor: str, words: str) -> str:
    return f'<text x="{x:g}" y="{y}" text-anchor="{anchor}">{words}</text>'


_WIDTH, _DECADE = 260, 50  # of the plot of a table, and the height of ten times the value
_LINE = 16  # of its legend

Points = list[tuple[int, float]]
"""Of a row of a table: the number of a column, and the value."""


def table_plot(content: Content, quantity: str) -> str:
    """An SVG picture: the rows of one table by its columns, which are numbers; both logarithmic."""
    rows: dict[str, Points] = {}
    for result in content["results"]:
        if result["quantity"] == quantity and result["value"] is not None:
            rows.setdefault(result["row"], []).append((int(result["column"]), result["value"]))
    points = [point for row in rows.values() for point in row]
    low = math.floor(math.log10(min(value for _, value in points)))
    high = math.ceil(math.log10(max(value for _, value in points)))
    height = _DECADE * (high - low)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="10" '
        f'viewBox="0 0 {_WIDTH + 460} {max(height, _LINE * len(rows)) + 50}">',
        f"<title>{quantity}, by the number of texts at once</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<g transform="translate({_MARGIN} 16)">',
        *_axes(sorted({number for number, _ in points}), low, high),
    ]
    for i, (name, row) in enumerate(rows.items()):
        lines += _row_of_plot(i, name, [_place(n, v, points, high) for n, v in row])
    return "\n".join([*lines, "</g>", "</svg>\n"])


def _place(number: int, value: float, points: Points, high: int) -> tuple[float, float]:
    widest = math.log2(max(n for n, _ in points)) or 1.0
    return _WIDTH * math.log2(number) / widest, _DECADE * (high - math.log10(value))


def _axes(numbers: Sequence[int], low: int, high: int) -> Iterator[str]:
    for power in range(low, high + 1):
        y = _DECADE * (high - power)
        yield f'<path d="M0 {y}h{_WIDTH}" stroke="#ddd"/>'
        yield _text(-4, y + 3, "end", f"{10.0**power:g}")
    bottom = _DECADE * (high - low)
    for number in numbers:
        x, _ = _place(number, 1.0, [(numbers[-1], 1.0)], high)
        yield _text(round(x, 1), bottom + 13, "middle", str(number))
    yield _text(_WIDTH / 2, bottom + 28, "middle", "texts at once")


def _row_of_plot(i: int, name: str, places: Sequence[tuple[float, float]]) -> Iterator[str]:
    """A line, its points, and its name; the colors come again, dashed."""
    color, dash = _COLORS[i % len(_COLORS)], ' stroke-dasharray="4 3"' if i >= len(_COLORS) else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{path}" fill="none" stroke="{color}"{dash}/>'
    for x, y in places:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>'
    sign = "◇" if dash else "■"
    yield _text(_WIDTH + 16, _LINE * i + 6, "start", f'<tspan fill="{color}">{sign} {name}</tspan>')


_PARTS: dict[str, Callable[[Content], Iterator[str]]] = {
    "offload": _offload_parts,
    "kernels": _kernel_parts,
    "zoo": _model_parts,
    "glm": _model_parts,
    "perplexity": _perplexity_parts,
    "table": text.parts,
}

if __name__ == "__main__":
    sys.exit(main())
