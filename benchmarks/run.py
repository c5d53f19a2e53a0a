"""`python -m benchmarks.run CASE --out FILE.json`: measures a case and writes one JSON file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.harness import Result, Settings, document, measure, summary
from bminf.units import format_bytes

# A case is a module with add_arguments(parser) and prepare(arguments), a context manager that
# gives the parameters for the JSON file and lists of variants; each list has its own reference.
# Where it has measure(list, settings) and table(results), these take the place of those here.
CASES = {
    "offload": "the wrapper against accelerate's offloading, on one model, under one limit",
    "kernels": "products with packed weights against those of torch and others",
    "zoo": "CPM-2's encoder and decoder with random weights, and a prediction for a small card",
    "glm": "GLM-130B's reading and writing with random weights, and a prediction for one card",
}


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the case was measured and its file written; 1 if a variant could not be measured."""
    arguments = _parser().parse_args(argv)
    settings = Settings(arguments.warmup, arguments.repeats, arguments.rounds)
    with arguments.prepare(arguments) as (parameters, groups):
        results = [result for group in groups for result in arguments.measure(group, settings)]
    content = document(arguments.case, parameters, settings, results)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(arguments.table(results))
    return int(any(result.get("failure") for result in content["results"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    cases = parser.add_subparsers(dest="case", metavar="CASE", required=True)
    for name, text in CASES.items():
        case = cases.add_parser(name, help=text, description=text)
        case.add_argument("--out", type=Path, metavar="FILE", help="the JSON file to write")
        for setting in ("warmup", "repeats", "rounds"):
            default = getattr(Settings, setting)
            case.add_argument(f"--{setting}", type=int, default=default, metavar="N")
        module = import_module(f"benchmarks.{name}")
        module.add_arguments(case)
        own = {"measure": measure, "table": table} | vars(module)
        case.set_defaults(**{key: own[key] for key in ("prepare", "measure", "table")})
    return parser


def table(results: Sequence[Result]) -> str:
    """The results as lines of text; everything in it is in the JSON file too."""
    head = f"{'variant':28} {'wall s':>9} {'spread':>7} {'CPU s':>9} {'RssAnon':>11} {'GPU':>11}"
    return "\n".join([head, *map(_row, results)])


def _row(result: Result) -> str:
    wall_s = summary([sample.wall_s for sample in result.samples])
    cpu_s = summary([sample.cpu_s for sample in result.samples])
    host, device = (
        "-" if peak is None else format_bytes(peak)
        for peak in (result.peak_rss_anon_bytes, result.peak_cuda_bytes)
    )
    return (
        f"{result.name:28} {wall_s['median']:9.3f} {wall_s['spread']:7.0%} "
        f"{cpu_s['median']:9.3f} {host:>11} {device:>11}"
    )


if __name__ == "__main__":
    sys.exit(main())
