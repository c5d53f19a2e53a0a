"""`python -m benchmarks.run CASE --out FILE.json`: measures a case and writes one JSON file.

The file is written before the first group of measurements and after each of them, so that a run
that is stopped, killed or fails leaves all that it had measured until then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.harness import Measured, Result, Settings, document, measure, summary
from benchmarks.whole_file import write_json
from bminf.units import format_bytes

# A case is a module with add_arguments(parser) and prepare(arguments), a context manager that
# gives the parameters for the JSON file and lists of variants; each list has its own reference.
# "left_out" among the parameters names what is not in the file: a case whose groups have names
# begins with all of them and takes each out as it yields it.
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
        content = document(arguments.case, parameters, settings, [])
        results = _measured(arguments, settings, groups, content)
    print(arguments.table(results))
    return int(any(result.get("failure") for result in content["results"]))


def _measured(
    arguments: argparse.Namespace,
    settings: Settings,
    groups: Iterable[Any],
    content: dict[str, Any],
) -> list[Measured]:
    """The results of all groups; puts them into `content` and its file as they come."""
    results: list[Measured] = []
    for group in groups:
        _write(arguments.out, content)
        for part in arguments.parts(group, settings):
            results += part
            content["results"] += [result.as_json() for result in part]
            _write(arguments.out, content)
    _write(arguments.out, content)
    return results


def _write(file: Path | None, content: dict[str, Any]) -> None:
    if file is not None:
        write_json(file, content)


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
        parts = own.get("parts", partial(_one_part, own["measure"]))
        case.set_defaults(prepare=own["prepare"], parts=parts, table=own["table"])
    return parser


def _one_part(
    measure: Callable[[Any, Settings], Sequence[Measured]], group: Any, settings: Settings
) -> Iterator[Sequence[Measured]]:
    yield measure(group, settings)


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
