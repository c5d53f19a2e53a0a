"""`python -m benchmarks.run CASE --out FILE.json`: measures a case and writes one JSON file.

The file is written before the first group of measurements and after each of them, so that a run
that is stopped, killed or fails leaves all that it had measured until then.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels, models, offload
from benchmarks.harness import Group, Result, Settings, write_json
from benchmarks.report import ROOT, table
from bminf.cli.tables.document import document
from tools import decoding, perplexity

# A case has add_arguments(parser) and prepare(arguments), which gives the parameters for the JSON
# file, and the groups with their names, see harness.Group.
CASES: dict[str, tuple[Any, str]] = {
    "offload": (offload, "the wrapper against accelerate's offloading, under one limit"),
    "kernels": (kernels, "products with packed weights against those of torch and others"),
    "zoo": (models.ZOO, "CPM-2 or EVA with random weights, and a prediction for a small card"),
    "glm": (models.GLM, "a GLM or CPM-1 with random weights, and a prediction for one card"),
    "decoding": (decoding, "what a token costs on the CPU, in each format and in llama.cpp"),
    "perplexity": (perplexity, "what packing does to the predictions of a model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the case was measured and its file written; 1 if a call could not be measured."""
    arguments = _parser().parse_args(argv)
    settings = Settings(arguments.warmup, arguments.repeats, arguments.rounds)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or before)
    try:
        parameters, groups = arguments.prepare(arguments)
        left_out = [name for name, _ in groups]
        parameters |= {"threads": torch.get_num_threads(), "left_out": left_out}
        content = document(arguments.case, parameters, asdict(settings), ROOT)
        for results in _measured(groups, left_out, settings, arguments.seconds):
            content["results"] += results
            if arguments.out is not None:
                write_json(arguments.out, content)
    finally:
        torch.set_num_threads(before)
    print(table(content))
    return int(any(result.get("failure") for result in content["results"]))


def _measured(
    groups: list[tuple[str, Group]], left_out: list[str], settings: Settings, seconds: float
) -> Iterator[list[Result]]:
    """Results as they come, and none before the first group and after each.

    `left_out`, the names of all, keeps those that would begin after so many seconds, and those that
    a run which is stopped does not come to. A group is let go of when the next one begins.
    """
    end = time.monotonic() + seconds
    yield []
    while groups and time.monotonic() <= end:
        yield from groups.pop(0)[1](settings)
        left_out.pop(0)
        yield []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    cases = parser.add_subparsers(dest="case", metavar="CASE", required=True)
    for name, (case, text) in CASES.items():
        own = cases.add_parser(name, help=text, description=text)
        add = own.add_argument
        add("--out", type=Path, metavar="FILE", help="the JSON file to write")
        add("--threads", type=int, default=1, metavar="N", help="of torch on the CPU; default: 1")
        add("--seconds", type=float, default=float("inf"), metavar="S",
            help="begin no group after so long; what is left out is in the file")  # fmt: skip
        for setting in fields(Settings):
            add(f"--{setting.name}", type=int, default=setting.default, metavar="N")
        case.add_arguments(own)
        own.set_defaults(prepare=case.prepare)
    return parser


if __name__ == "__main__":
    sys.exit(main())
