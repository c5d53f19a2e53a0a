"""`python -m benchmarks.gpu_session FOLDER`: all that needs a GPU, one command, under 8 minutes.

Tests marked gpu and the benchmarks, each in a process of its own with a time limit; a step that
fails does not keep the next from running. FOLDER gets the JSON files and session.log with all that
was printed; a short summary comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import glm_table, kernels_table, zoo_table
from benchmarks.kernels_targets import targets

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = "tests/gpu/test_kernels.py"
LOG = "session.log"
ZOO, GLM = "zoo-cuda.json", "glm-cuda.json"
SECONDS = 465.0

_START_S = 15.0  # of a process, with torch, before it measures; and for its last group
_LEAST_S = 12.0  # a step is not begun with less time left
# After one of these nothing runs in the process any more: what fails behind it says nothing.
_BROKEN_CONTEXT = re.compile(
    "illegal memory access|illegal address|illegal instruction|misaligned address|"
    "unspecified launch failure|device-side assert|hardware stack error",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Step:
    """A command of Python's -m. seconds: its limit.   tests: that it is pytest, see run_tests."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    tests: bool = False


def steps(folder: Path) -> list[Step]:
    """What matters most comes first."""

    def kernels(name: str, seconds: float, *arguments: str) -> Step:
        out = str(folder / f"kernels-cuda-{name}.json")
        limit = str(seconds - _START_S)
        own = ("benchmarks.run", "kernels", "--device", "cuda", "--out", out, "--seconds", limit)
        return Step(f"kernels {name}", (*own, *arguments), seconds)

    large = ("--shapes", "12288x12288", "--rows", "1", "4", "16", "128", "2048")
    offload = ("benchmarks.run", "offload", "--device", "cuda", "--dtype", "float16")
    model = ("--model", "random", "--hidden-size", "2048", "--layers", "8", "--tokens", "16")
    offload_out = ("--rounds", "1", "--repeats", "2", "--out", str(folder / "offload-cuda.json"))
    # CPM-2 in full, streamed as on a small card and then resident; few steps, each as any other.
    zoo = ("benchmarks.run", "zoo", "--device", "cuda", "--memory-limit", "6GB", "16GB")
    zoo_runs = ("--steps", "24", "--warmup", "0", "--repeats", "2", "--seconds", "25")
    zoo_out = ("--out", str(folder / ZOO))
    # Some layers of GLM-130B in full size, most of them streamed, and then resident.
    glm = ("benchmarks.run", "glm", "--device", "cuda", "--layers", "6", "--seconds", "20")
    glm_runs = ("--memory-limit", "4GB", "16GB", "--encode", "512", "--decode", "16")
    glm_out = ("--out", str(folder / GLM))
    others = ("int4-g32-minimum", "int4-g64", "int4-g128", "int4-row", "int8-g128")
    formats = ("--formats", "int4", *others)
    return [
        Step("kernel tests", ("pytest", "-m", "gpu", KERNEL_TESTS), 130, tests=True),
        kernels("weight-only", 90, "--ops", "weight-only"),
        kernels("w8a8", 62, "--ops", "w8a8"),
        Step("other tests", ("pytest", "-m", "gpu", f"--ignore={KERNEL_TESTS}"), 80, tests=True),
        Step("zoo", (*zoo, *zoo_runs, *zoo_out), 55),
        Step("glm", (*glm, *glm_runs, *glm_out), 48),
        kernels("others", 43, "--ops", "gated", "rows", "dequantize"),
        kernels("bfloat16", 35, "--ops", "weight-only", "w8a8", "--dtype", "bfloat16", *large),
        kernels("formats", 32, "--ops", "weight-only", *formats, *large),
        Step("offload", (*offload, *model, *offload_out), 50),
    ]


@dataclass
class Outcome:
    """What became of a step. code: its exit status, None if it was stopped or not begun."""

    step: Step
    code: int | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        status = "stopped or not begun" if self.code is None else f"exit status {self.code}"
        return "\n    ".join([f"{self.step.name}: {status}, {self.seconds:.0f} s", *self.notes])


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every step ended with 0, otherwise 1."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    outcomes = []
    with (folder / LOG).open("w", encoding="utf-8") as log:
        for step in steps(folder):
            if arguments.only and step.name not in arguments.only:
                continue
            print(f"{step.name} ...", flush=True)
            run = run_tests if step.tests else run_step
            outcomes.append(run(step, log.fileno(), end))
    print(summary_of(folder, outcomes))
    return int(any(outcome.code != 0 for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all; default: 465")
    names = [step.name for step in steps(Path())]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    return parser


def run_step(step: Step, log: int, end: float) -> Outcome:
    """Runs a step until its own limit or that of the session."""
    outcome = Outcome(step)
    limit = min(step.seconds, end - time.monotonic())
    os.write(log, f"\n==== {step.name}: {' '.join(step.arguments)}\n".encode())
    if limit < _LEAST_S:
        outcome.notes.append("no time was left")
        return outcome
    began = time.monotonic()
    outcome.code = _run(step.arguments, log, limit)
    outcome.seconds = time.monotonic() - began
    return outcome


def _run(arguments: Sequence[str], log: int, limit: float) -> int | None:
    """The exit status; None if the limit was reached, which interrupts first and kills then."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | _environment(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    for number, patience in ((signal.SIGINT, limit), (signal.SIGKILL, 4.0), (None, 4.0)):
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            if number is not None:
                os.killpg(process.pid, number)
            continue
        return code if number is signal.SIGINT else None
    return None


def _environment() -> dict[str, str]:
    """Of the steps: the checkout need not be installed, and nothing reaches for a network."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }


# ---- tests ---------------------------------------------------------------------------------------


def run_tests(step: Step, log: int, end: float) -> Outcome:
    """Runs pytest; after an error that breaks the process, the tests behind it in a new one."""
    step_end = min(end, time.monotonic() + step.seconds)
    arguments, failed = step.arguments, list[str]()
    outcome = Outcome(step)
    with tempfile.TemporaryDirectory(prefix="bminf-session-") as folder:
        while True:
            report = Path(folder) / f"{len(failed)}.xml"
            # Versions of packages differ from machine to machine, and with them the warnings.
            options = ("-W", "default", "-p", "no:cacheprovider", f"--junitxml={report}")
            more = ("--continue-on-collection-errors", "--tb=short", "-ofaulthandler_timeout=60")
            attempt = Step(step.name, (*arguments, *options, *more), step.seconds, True)
            latest = run_step(attempt, log, step_end)
            outcome.seconds += latest.seconds
            outcome.code = latest.code if outcome.code in (0, None) else outcome.code
            broken, behind = _failures(report)
            failed += broken
            if not behind or latest.code is None:
                break
            arguments = ("pytest", *behind)
    outcome.notes += [_shortened(line) for line in [*failed, *latest.notes]]
    return outcome


def _failures(report: Path) -> tuple[list[str], list[str]]:
    """The tests that failed by themselves, with the reason, and those behind a broken context."""
    failed: list[str] = []
    behind: list[str] = []
    is_broken = False
    if not report.is_file():
        return failed, behind
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        if problem is None:
            continue
        text = f"{problem.get('message', '')} {problem.text or ''}"
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        breaks = _BROKEN_CONTEXT.search(text) is not None
        if is_broken and breaks:
            behind.append(name)
            continue
        is_broken |= breaks
        failed.append(f"{name}: {problem.get('message', '')}")
    return failed, behind


def _shortened(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."


# ---- the summary ---------------------------------------------------------------------------------


def summary_of(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Times, then what failed and which targets were reached: the end of it matters most."""
    contents = {file.stem: _read(file) for file in sorted(folder.glob("kernels-*.json"))}
    parts = ["", "==== us by rows of activations; * what the op chooses"]
    for content in contents.values():
        parts += kernels_table.lines(content)
    if (folder / ZOO).is_file():
        parts += ["==== CPM-2", *zoo_table.lines(_read(folder / ZOO))]
    if (folder / GLM).is_file():
        parts += ["==== GLM-130B", *glm_table.lines(_read(folder / GLM))]
    parts.append("==== steps")
    parts += map(str, outcomes)
    for name, content in contents.items():
        parts.append(f"==== {name}")
        failures = [result for result in content["results"] if result["failure"]]
        parts += [_shortened(f"{r['name']}: {r['failure']}") for r in failures[:12]]
        left_out = content["parameters"]["left_out"]
        parts += [f"left out for lack of time: {len(left_out)} groups"] if left_out else []
        parts += map(str, targets(content))
    return "\n".join(parts)


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    sys.exit(main())
