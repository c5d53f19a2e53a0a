"""`python -m benchmarks.gpu_session inspect FOLDER`: the kernels under NVIDIA's own tools.

compute-sanitizer looks for accesses outside an allocation and for races over a small choice of the
kernel tests' cases; ncu says what the kernels wait for. A tool that is not there is a failure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_session import brought
from benchmarks.gpu_session.session import Session, add_folders, archive_of
from benchmarks.gpu_session.steps import Step

SECONDS = 90.0
PROFILE = "kernels.ncu-rep"

_CASES = "benchmarks.gpu_session.few_cases"
_PRODUCTS = "benchmarks.gpu_session.three_products"
_WRONG = 86  # exit status of compute-sanitizer where it finds something


def main(argv: Sequence[str]) -> int:
    """0 if all tools are there and find nothing wrong, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session inspect")
    add_folders(parser)
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder.resolve()
    session = Session(folder, archive_of(arguments), brought.environment(arguments.brought))
    return session.run(steps(folder), SECONDS)


def steps(folder: Path) -> list[Step]:
    """The limits are SECONDS in all."""
    profile = str(folder / PROFILE)
    # The clocks stay as they are. A warm-up comes before the profiler is started.
    ncu = ("ncu", "--clock-control", "none", "--set", "full", "--profile-from-start", "off")
    export = (*ncu, "--force-overwrite", "--export", profile)
    return [
        _sanitizer("memcheck", 28),
        _sanitizer("racecheck", 25),
        Step("ncu", (_PRODUCTS,), 25, files=(PROFILE,), tool=export),
        Step("ncu, as text", (), 12, tool=("ncu", "--import", profile, "--page", "details")),
    ]


def _sanitizer(tool: str, seconds: float) -> Step:
    options = ("--tool", tool, "--error-exitcode", str(_WRONG))
    # Each tensor is an allocation: torch's pool would hide what is read beyond one.
    own = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    tool_and_options = ("compute-sanitizer", *options)
    return Step(tool, (_CASES,), seconds, tool=tool_and_options, environment=own)
