"""`python -m benchmarks.report`: tables and plots in the documents, out of the JSON files.

What stands between marks in DOCUMENTS comes out of benchmarks/results (tools/marked.py says how);
PLOTS are whole files. Nobody types a number, and nothing is measured here.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import by_size
from benchmarks.by_size import Content, Result, Size, Variants, by_op, over_plain, ways_of
from benchmarks.plots import levels_plot, plot, table_plot
from benchmarks.targets import targets
from bminf.cli.tables import text
from bminf.cli.tables.published import published
from bminf.cli.tables.text import digits, markdown
from bminf.units import format_bytes
from tools.marked import filled

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = tuple(
    path.relative_to(ROOT).as_posix()
    for folder in (ROOT, ROOT / "docs", ROOT / "benchmarks")
    for path in sorted(folder.glob("*.md"))
    if re.search(r"<!-- \S+\.json", path.read_text(encoding="utf-8"))
)
PLOTS = {  # of which op, or of which numbers of a table
    "docs/kernels-cpu.svg": ("kernels-cpu.json", "linear rotated"),
    "docs/kernels-cpu-levels.svg": ("kernels-cpu-levels.json", "levels"),
    "docs/table-bloom-cpu.svg": ("table-bloom-cpu.json", "ms_per_token"),
}


def main() -> int:
    """0, after the tables in all documents, and the plots, were renewed."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name in PLOTS:
        (ROOT / name).write_text(plot_of(name), encoding="utf-8")
    return 0


def with_tables(text: str) -> str:
    """`text` with the tables and numbers of all marked files in their places."""
    return filled(text, read_result, table)


def plot_of(name: str) -> str:
    """The picture that belongs into the file `name` of PLOTS."""
    file, what = PLOTS[name]
    content = read_result(file)
    kinds = {"table": table_plot, "levels": levels_plot}
    return kinds.get(content["case"], kinds.get(what, plot))(content, what)


def read_result(name: str) -> Content:
    """The content of a file in benchmarks/results."""
    path = ROOT / "benchmarks" / "results" / name
    content: Content = json.loads(path.read_text(encoding="utf-8"))
    return content


def table(content: Content, view: str = "") -> str:
    """Captions and Markdown tables of one run; `view` is for a case that has several."""
    given = (content, view) if view else (content,)
    parts = [part.rstrip() for part in _PARTS[content["case"]](*given)]
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


def _parts_of_tool(content: Content, *view: str) -> Iterator[str]:
    """Those of the case that lies in tools/, whose module imports torch."""
    parts: Iterator[str] = import_module(f"tools.{content['case']}").table_parts(content, *view)
    return parts


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


def _kernel_parts(content: Content) -> Iterator[str]:
    """A table for each op, sizes down, ways to compute across; then what failed, and targets."""
    yield (
        f"{_device(content)}, torch {content['versions']['torch']}, "
        f"{content['parameters']['dtype']}{''.join(_bandwidths(content))}. "
        "Median in µs, where one thread of the CPU computes of CPU time; in parentheses that over "
        "torch's without quantization, or, where there is no such product and for levels, the "
        "share of the bandwidth of the copy or of as many threads that read. "
        "Bold: what the op chooses."
    )
    for op, sizes in by_op(content).items():
        yield f"**{op}**"
        yield _levels_table(sizes) if op == "levels" else _sizes_table(sizes)
    failed = [f"{r['name']}: {r['failure']}" for r in content["results"] if r["failure"]]
    for title, lines in (("Not measured:", failed), ("Targets:", targets(content))):
        if lines:
            yield title
            yield "".join(f"- {line}\n" for line in lines)


def _bandwidths(content: Content) -> Iterator[str]:
    """Of what the others are compared with; medians of all groups."""
    found: dict[str, list[float]] = {}
    for result in (r for r in content["results"] if r["details"]["op"] in by_size.FIRST):
        if result["time_s"]:
            name = result["name"].partition(": ")[2]
            found.setdefault(name, []).append(by_size.bytes_per_s(result) / 1e9)
    yield from (f"; {name}: {statistics.median(own):.1f} GB/s" for name, own in found.items())


def _sizes_table(sizes: dict[Size, Variants]) -> str:
    rows = [
        [shape, str(num_rows), *(_time_cell(name, variants) for name in ways_of(sizes))]
        for (shape, num_rows), variants in sizes.items()
    ]
    return markdown(["N x K", "M", *ways_of(sizes)], rows)


def _levels_table(sizes: dict[Size, Variants]) -> str:
    """Ways to compute down, as there are many, and sizes across."""

    def cell(own: Result | None) -> str:
        if own is None:
            return ""
        share = own["details"].get("read_fraction", math.nan)
        return f"{digits(by_size.seconds(own) * 1e6)} ({share:.0%})"

    rows = [[way, *(cell(own.get(way)) for own in sizes.values())] for way in ways_of(sizes)]
    return markdown(["", *(f"{shape} M={num_rows}" for shape, num_rows in sizes)], rows)


def _time_cell(name: str, variants: Variants) -> str:
    if name not in variants:
        return ""
    details, over = variants[name]["details"], over_plain(name, variants)
    share = details.get("copy_fraction", math.nan)  # where the copy failed, nobody knows
    compared = f"{share:.0%}" if over is None else f"{over:.2f}"
    text = f"{digits(by_size.seconds(variants[name]) * 1e6)} ({compared})"
    return f"**{text}**" if details.get("is_chosen") else text


_PARTS: dict[str, Callable[..., Iterator[str]]] = {
    "offload": _offload_parts,
    "kernels": _kernel_parts,
    "zoo": _model_parts,
    "glm": _model_parts,
    "perplexity": _parts_of_tool,
    "decoding": _parts_of_tool,
    **dict.fromkeys(("predictions", "predict_kernels"), _parts_of_tool),
    "table": text.parts,
}

if __name__ == "__main__":
    sys.exit(main())
