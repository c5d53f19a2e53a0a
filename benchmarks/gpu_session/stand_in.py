"""Steps that take no GPU and no time, for a dry run of a session: what they leave is as large and
as often written as that of the steps that they stand for, and holds nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.steps import Step
from benchmarks.whole_file import write_json

NUM_GROUPS = 3


def stand_in(step: Step, folder: Path, *options: str) -> Step:
    """`step` with nothing of its work: the same name, limit and files."""
    files = [str(folder / name) for name in step.files]
    module = "benchmarks.gpu_session.stand_in"
    arguments = (module, "--files", *files, *options)
    return replace(step, arguments=arguments, tool=())


def main(argv: Sequence[str]) -> int:
    """0, or what --exit says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session.stand_in")
    add = parser.add_argument
    add("--files", nargs="*", type=Path, default=[], help="written after each group")
    add("--reports", type=Path, help="as pytest writes it: a test for each group")
    add("--outcome", default="passed", help="of the tests")
    add("--hang-after", type=int, metavar="N", help="so many groups")
    add("--exit", type=int, default=0, metavar="STATUS")
    arguments, _ = parser.parse_known_args(argv)  # the others are pytest's
    print(f"process {os.getpid()}", flush=True)
    for number in range(NUM_GROUPS):
        if number == arguments.hang_after:
            time.sleep(600)
        _leave(arguments, number)
    return int(arguments.exit)


def _leave(arguments: argparse.Namespace, number: int) -> None:
    """The results of group `number`, and those before it."""
    results = [{"name": f"group {i}", "failure": "a stand-in"} for i in range(number + 1)]
    left_out = [f"group {i}" for i in range(number + 1, NUM_GROUPS)]
    content: dict[str, Any] = {"results": results, "parameters": {"left_out": left_out}}
    for file in arguments.files:
        write_json(file, content)
    if arguments.reports is not None:
        line = {"test": f"test_{number}", "outcome": arguments.outcome}
        with arguments.reports.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
