"""`python -m benchmarks.run CASE --out FILE.json`: measures a case and writes one JSON file.

The file is written before the first group of measurements and after each of them, so that a run
that is stopped, killed or fails leaves all that it had measured until then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks import kernels, models, offload, perplexity
from benchmarks.harness import Settings, document
from benchmarks.report import table
from benchmarks.whole_file import write_json

# A case has add_arguments(parser) and prepare(arguments), a context manager that gives the
# parameters for the JSON file, and groups, see harness.Group. "left_out" among the parameters names
# what is not in the file, see harness.in_time().
CASES: dict[str, tuple[Any, str]] = {
    "offload": (offload, "the wrapper against accelerate's offloading, under one limit"),
    "kernels": (kernels, "products with packed weights against those of torch and others"),
    "zoo": (models.ZOO, "CPM-2 or EVA with random weights, and a prediction for a small card"),
    "glm": (models.GLM, "a GLM or CPM-1 with random weights, and a prediction for one card"),
    "perplexity": (perplexity, "what packing does to the predictions of a model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the case was measured and its file written; 1 if a call could not be measured."""
    arguments = _parser().parse_args(argv)
    settings = Settings(arguments.warmup, arguments.repeats, arguments.rounds)
    with arguments.prepare(arguments) as (parameters, groups):
        content = document(arguments.case, parameters, settings)
        for group in groups:
            _write(arguments.out, content)
            for results in group(settings):
                content["results"] += results
                _write(arguments.out, content)
        _write(arguments.out, content)
    print(table(content))
    return int(any(result.get("failure") for result in content["results"]))


def _write(file: Path | None, content: dict[str, Any]) -> None:
    if file is not None:
        write_json(file, content)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    cases = parser.add_subparsers(dest="case", metavar="CASE", required=True)
    for name, (case, text) in CASES.items():
        own = cases.add_parser(name, help=text, description=text)
        own.add_argument("--out", type=Path, metavar="FILE", help="the JSON file to write")
        for setting in fields(Settings):
            own.add_argument(f"--{setting.name}", type=int, default=setting.default, metavar="N")
        case.add_arguments(own)
        own.set_defaults(prepare=case.prepare)
    return parser


if __name__ == "__main__":
    sys.exit(main())
