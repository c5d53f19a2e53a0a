"""`python -m tools.overheads BEFORE AFTER`: what bminf's own Python costs, of two checkouts.

Each folder is a checkout of the repository. Its bminf runs in a process of its own, and the
processes take turns, one measurement each, so that noise on the machine hits all alike:

token  CPU time that streaming adds to a token of a random Llama with tiny matrices
block  the same, for one of its blocks
load   CPU time of loading a tiny GLM

Medians, and the least to the most of all measurements, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import summary

MEASUREMENTS = ("token", "load")
_WORK = Path(__file__).with_name("overheads_work.py")
# The folder of a script would come first on its path, and hide modules by the names of ours; a
# bminf that cannot be imported is told before torch is.
_START = "import bminf, runpy; runpy.run_path({!r}, run_name='__main__')"


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the table was printed."""
    arguments = _arguments(argv)
    sizes = (arguments.blocks, arguments.tokens)
    with ExitStack() as stack:
        checkouts = [stack.enter_context(running(path, sizes)) for path in arguments.checkouts]
        measure(checkouts, arguments.repeats, MEASUREMENTS)
    found = [checkout.as_json(arguments.blocks) for checkout in checkouts]
    print(table(found))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools.overheads", description=__doc__, formatter_class=form)
    parser.add_argument(
        "checkouts", nargs="+", type=Path, metavar="FOLDER", help="of the repository"
    )
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument(
        "--blocks", type=int, default=30, metavar="N", help="of the Llama; default: 30"
    )
    parser.add_argument(
        "--tokens", type=int, default=40, metavar="N", help="a measurement; default: 40"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with all measurements")
    return parser.parse_args(argv)


@dataclass
class Checkout:
    """A process with the bminf of one folder, and what it has measured, in seconds."""

    folder: Path
    process: subprocess.Popen[str]
    samples_s: dict[str, list[float]] = field(default_factory=dict)

    def ask(self, name: str) -> float:
        """One measurement.   Raises RuntimeError where the process has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return float(self.answer())

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.folder} has ended; its error stands above")
        return json.loads(line)

    def as_json(self, num_blocks: int | None = None) -> dict[str, Any]:
        """num_blocks: that the measurement "token" is the sum of; there is "block", too, then."""
        samples_s = dict(self.samples_s)
        if num_blocks is not None:
            samples_s["block"] = [s / num_blocks for s in samples_s["token"]]
        return {
            "checkout": str(self.folder),
            "samples_s": samples_s,
            "cpu_s": {name: summary(samples) for name, samples in samples_s.items()},
        }


@contextmanager
def running(folder: Path, sizes: Sequence[int], work: Path = _WORK) -> Iterator[Checkout]:
    """The process of a checkout; it ends at the end.

    work: the file that it runs, with `sizes`: by default blocks of the Llama, and tokens in a
    measurement.
    Raises RuntimeError where there is no bminf, or another one would be measured.
    """
    folder = folder.resolve()
    if not (folder / "bminf" / "__init__.py").is_file():
        raise RuntimeError(f"{folder} has no bminf; give the folder of a checkout")
    process = subprocess.Popen(
        [sys.executable, "-c", _START.format(str(work)), *map(str, sizes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        checkout = Checkout(folder, process)
        if not (file := Path(checkout.answer())).is_relative_to(folder):
            raise RuntimeError(f"{file} would be measured in the place of {folder}")
        yield checkout
    finally:
        process.communicate()  # the end of its input ends it


def measure(checkouts: Sequence[Checkout], repeats: int, names: Sequence[str]) -> None:
    """`repeats` samples of each measurement and checkout, in turns; the first round is dropped."""
    for number in range(repeats + 1):
        for name in names:
            for checkout in checkouts:
                sample_s = checkout.ask(name)
                if number:
                    checkout.samples_s.setdefault(name, []).append(sample_s)


def table(found: Sequence[dict[str, Any]]) -> str:
    """A line for each measurement: of each checkout the times, and the ratio to the first one."""
    lines = [" ".join(["     ", *(f"{_cut(one['checkout']):>30}" for one in found)])]
    for name in found[0]["cpu_s"]:
        first = found[0]["cpu_s"][name]["median"]
        cells = (_cell(one["cpu_s"][name], first) for one in found)
        lines.append(" ".join([f"{name:5}", *(f"{cell:>30}" for cell in cells)]))
    return "\n".join(lines)


def _cell(times: dict[str, float], first_s: float) -> str:
    median, least, most = (f"{times[key] * 1e3:.3f}" for key in ("median", "min", "max"))
    return f"{median} ({least}-{most}) x{times['median'] / first_s:.2f}"


def _cut(folder: str) -> str:
    """The end of a path, as wide as a column."""
    return folder[-30:]


if __name__ == "__main__":
    sys.exit(main())
