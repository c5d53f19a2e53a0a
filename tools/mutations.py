"""`python -m tools.mutations`: which tests notice a fault that is planted into bminf.

Each fault of tools/faults.py is planted alone, into a copy of the checkout of its own. Tests run in
two stages until one fails:

quick  those that are not marked slow, where there is such a mark
whole  everything

In both the nearest come first: the files called test_<source>.py, then the folder of tests that
belongs to the source's, then all.

The test that fails is run again without the fault, and has to pass. A line of JSON tells of each
fault whether it fell, in which stage, by which test, and the CPU seconds that each stage took.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tools.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
FELL, SURVIVED, ABSENT = "fell", "survived", "absent"
FAILS_ANYWAY = "its test fails anyway"
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".session", "__pycache__", ".*_cache")
# They look at the text of the code, which every fault changes.
_OF_THE_TEXT = ("test_style.py", "test_mutations.py")
_PASSED, _NO_TESTS = 0, 5  # of pytest
_LEAST_TIMEOUT_S = 600.0  # of the run without the fault, however little time a stage has
_NO_TEST = "no test: "
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every fault fell, otherwise 1."""
    options = _arguments(argv)
    faults = [each for each in FAULTS if fnmatch.fnmatch(each.name, options.only)]
    if not faults:
        raise SystemExit(f"--only {options.only}: no fault has such a name, see tools/faults.py")
    checkout = options.checkout.resolve()
    if checkout == ROOT:
        for fault in faults:
            located(checkout, fault)
    found = []
    # Processes, because each counts the CPU time of what it has started.
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        arguments = (checkout, options.stages, options.timeout)
        waiting = [pool.submit(examine, fault, *arguments) for fault in faults]
        for done in as_completed(waiting):
            found.append(done.result())
            print(json.dumps(found[-1]), flush=True)
    left = sorted(f"{each['fault']} ({each['outcome']})" for each in found if not _fell(each))
    print(f"{len(found) - len(left)} of {len(found)} fell", *left, sep="\n", file=sys.stderr)
    return 1 if left else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m tools.mutations", description=__doc__, formatter_class=form
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of the names of faults")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--checkout", type=Path, default=ROOT, metavar="FOLDER",
        help="another one, where faults whose line is not there are absent",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time")
    parser.add_argument(
        "--timeout", type=float, default=1800.0, metavar="SECONDS",
        help="of a stage; a fault whose tests take longer has fallen",
    )  # fmt: skip
    return parser.parse_args(argv)


def _fell(found: dict[str, Any]) -> bool:
    return bool(found["outcome"] == FELL)


# ---- one fault -----------------------------------------------------------------------------------


def located(folder: Path, fault: Fault) -> Path:
    """The source with the line, relative to `folder`: the one that is named, or, in a checkout of
    another time, any of the same package.

    Raises ValueError where the line is not there exactly once.
    """
    named = Path(fault.file)
    counts = {
        path.relative_to(folder): path.read_text(encoding="utf-8").count(fault.old)
        for path in sorted((folder / named.parts[0]).rglob("*.py"))
    }
    found = {named: counts[named]} if counts.get(named) else counts
    if (total := sum(found.values())) != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} stands {total} times in {named}, not once")
    return next(path for path, count in found.items() if count)


def examine(
    fault: Fault, checkout: Path, stages: Sequence[str], timeout_s: float
) -> dict[str, Any]:
    """What became of `fault` in a copy of `checkout`."""
    found: dict[str, Any] = {"fault": fault.name, "outcome": SURVIVED, "stage": None, "test": None}
    cpu_s = found["cpu_s"] = {}
    try:
        source = located(checkout, fault)
    except ValueError:
        return {**found, "outcome": ABSENT}
    with _copied(checkout) as folder:
        plant(folder / source, fault)
        for stage in stages:
            run = _Run(folder, timeout_s)
            failed = STAGES[stage](run, source)
            cpu_s[stage] = round(run.cpu_s, 1)
            if failed is not None:
                shutil.copy2(checkout / source, folder / source)
                outcome = FELL if _passes(folder, failed, timeout_s) else FAILS_ANYWAY
                return {**found, "outcome": outcome, "stage": stage, "test": failed}
    return found


def plant(source: Path, fault: Fault) -> None:
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


@contextmanager
def _copied(checkout: Path) -> Iterator[Path]:
    """A copy of the checkout, beside the shared/ that stands beside it."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "checkout")
        shutil.copytree(checkout, folder, ignore=_LEFT_OUT)
        if (shared := checkout.parent / "shared").exists():
            Path(parent, "shared").symlink_to(shared)
        yield folder


def _passes(folder: Path, failed: str, timeout_s: float) -> bool:
    """Whether the test passes in `folder`, which has no fault any more, with all its parameters:
    the summary of pytest does not say where those end. Where no test began, all can be collected.
    """
    began = "::" in failed and not failed.startswith(_NO_TEST)
    run = _Run(folder, max(timeout_s, _LEAST_TIMEOUT_S))
    return run.pytest(failed.partition("[")[0] if began else "--collect-only") is None


# ---- tests ---------------------------------------------------------------------------------------


@dataclass
class _Run:
    """Tests of a folder, and the CPU seconds that they and what they started took."""

    folder: Path
    timeout_s: float
    cpu_s: float = field(default=0.0, init=False)

    def pytest(self, *arguments: str) -> str | None:
        """The first test that fails; None where all pass, or there are none."""
        ignored = [f"--ignore-glob=*/{name}" for name in _OF_THE_TEXT]
        command = ["pytest", "-x", "-rfE", "-p", "no:cacheprovider", *ignored, *arguments]
        code, output = self._python("-m", *command)
        if code in (_PASSED, _NO_TESTS):
            return None
        failed = _FAILED.search(output)
        return failed[1] if failed else f"{_NO_TEST}pytest ended with {code}: {output[-400:]}"

    def has_mark(self, name: str) -> bool:
        return f"@pytest.mark.{name}:" in self._python("-m", "pytest", "--markers")[1]

    def _python(self, *arguments: str) -> tuple[int, str]:
        """Exit code, and what was printed."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment.pop("PYTEST_ADDOPTS", None)
        before_s = _children_cpu_s()
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=self.timeout_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, KeyboardInterrupt):
                raise
            output = f"no end in {self.timeout_s:g} s"
        self.cpu_s += _children_cpu_s() - before_s
        return process.returncode, output


def _children_cpu_s() -> float:
    """Of all processes that this one started and waited for; it runs one at a time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _nearest_first(run: _Run, source: Path, *options: str) -> str | None:
    """Others are not even collected where one of the nearest fails."""
    for files in filter(None, nearest(run.folder / "tests", source)):
        if failed := run.pytest(*options, *map(str, files)):
            return failed
    return run.pytest(*options)


def nearest(tests: Path, source: Path) -> tuple[list[Path], list[Path]]:
    """Test files in `tests` for a source, such as bminf/offload/ring.py: those of its name, and the
    others of its package; of a source in none, those in none."""
    top, *packages = source.parent.parts
    stem = (packages or [top])[-1] if source.stem == "__init__" else source.stem
    named = sorted(tests.rglob(f"test_{stem}.py"))
    own = (tests / packages[0]).rglob("test_*.py") if packages else tests.glob("test_*.py")
    return named, [file for file in sorted(own) if file not in named]


def _quick(run: _Run, source: Path) -> str | None:
    return _nearest_first(run, source, "-m", "not slow") if run.has_mark("slow") else None


STAGES: dict[str, Callable[[_Run, Path], str | None]] = {"quick": _quick, "whole": _nearest_first}


if __name__ == "__main__":
    sys.exit(main())
