"""`python -m benchmarks.table`: tables and plots in the documents, out of the JSON files.

Between the two comments `<!-- FILE.json -->` and `<!-- end -->` in one of DOCUMENTS stands the
table of benchmarks/results/FILE.json; PLOTS are whole files. Nobody types a number.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import glm_table, kernels_table, zoo_table
from benchmarks.kernels_table import markdown
from benchmarks.kernels_targets import targets
from bminf.units import format_bytes

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/quantization.md", "docs/kernels.md", "benchmarks/README.md")
PLOTS = {"docs/kernels-cpu.svg": ("kernels-cpu.json", "linear rotated")}  # of which op
_MARKED = re.compile(r"<!-- (\S+\.json) -->\n.*?<!-- end -->", re.DOTALL)


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
    return _MARKED.sub(lambda mark: f"<!-- {mark[1]} -->\n{_of_file(mark[1])}<!-- end -->", text)


def plot_of(name: str) -> str:
    """The picture that belongs into the file `name` of PLOTS."""
    file, op = PLOTS[name]
    return kernels_table.plot(_content(file), op)


def _of_file(name: str) -> str:
    return table(_content(name))


def _content(name: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / name
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def table(content: dict[str, Any]) -> str:
    """A caption and a Markdown table of one run."""
    if content["case"] == "perplexity":
        return _perplexity_table(content)
    if content["case"] == "zoo":
        return zoo_table.table(content)
    if content["case"] == "glm":
        return glm_table.table(content)
    if content["case"] == "kernels":
        reached = "".join(f"- {target}\n" for target in targets(content))
        return f"{kernels_table.table(content)}\nTargets:\n\n{reached}"
    return _times_table(content)


def _times_table(content: dict[str, Any]) -> str:
    """The median of each variant, per token."""
    plain = content["results"][0]
    rows = [_row(result, plain) for result in content["results"]]
    head = ["", "ms / token", "CPU ms / token", "CPU, plain = 1", "peak memory"]
    return f"{_caption(content)}\n\n{markdown(head, rows)}"


def _row(result: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    tokens = result["details"]["tokens"]
    wall_s, cpu_s = (result[name]["median"] / tokens for name in ("wall_s", "cpu_s"))
    ratio = result["cpu_s"]["median"] / plain["cpu_s"]["median"]
    peak = result["peak_cuda_bytes"] or result["peak_rss_anon_bytes"]
    return [
        result["name"],
        f"{wall_s * 1e3:.1f}",
        f"{cpu_s * 1e3:.1f}",
        f"{ratio:.2f}",
        format_bytes(peak),
    ]


def _caption(content: dict[str, Any]) -> str:
    hardware, parameters = content["hardware"], content["parameters"]
    device = hardware["gpu"]["name"] if hardware["gpu"] else hardware["cpu"]
    return (
        f"{parameters['model']}, {parameters['dtype']}, {parameters['tokens']} tokens, "
        f"{parameters['threads']} torch thread(s), {device}, {hardware['cores']} cores; "
        f"median of {len(content['results'][0]['samples'])} runs:"
    )


def _perplexity_table(content: dict[str, Any]) -> str:
    """Perplexity against fp32, and KL, of each format in the columns' own order and permuted."""
    parameters = content["parameters"]
    tokens = parameters["windows"] * parameters["window"]
    caption = (
        f"{parameters['model']}, {parameters['weights'] / 1e6:.0f} M weights in "
        f"{parameters['linears']} linears, {tokens} tokens of text; "
        f"permuted: median (least to most) of {parameters['seeds']} orders:"
    )
    head = ["", "bits / weight", "perplexity", "/ fp32", "KL", "permuted, / fp32", "permuted, KL"]
    rows = [_perplexity_row(result) for result in content["results"]]
    return f"{caption}\n\n{markdown(head, rows)}"


def _perplexity_row(result: dict[str, Any]) -> list[str]:
    own, permuted = result["own_order"], result["permuted"]
    return [
        result["name"],
        f"{result['bits_per_weight']:.3f}",
        f"{own['perplexity']['median']:.3f}",
        f"{own['ratio']['median']:.4f}",
        f"{own['kl']['median']:.4f}",
        *(_with_spread(permuted[key]) for key in ("ratio", "kl")),
    ]


def _with_spread(values: dict[str, float]) -> str:
    least, median, most = (f"{values[key]:.3f}" for key in ("min", "median", "max"))
    return median if least == most else f"{median} ({least} to {most})"


if __name__ == "__main__":
    sys.exit(main())
