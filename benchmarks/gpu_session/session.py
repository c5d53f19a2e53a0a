"""The steps of a session, one after the other, and what is kept of them."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.gpu_session import brought, process
from benchmarks.gpu_session.archive import ARCHIVE, pack
from benchmarks.gpu_session.outcome import (
    Outcome,
    behind_a_broken_context,
    one_a_test,
    problems_of,
    read_reports,
)
from benchmarks.gpu_session.stand_in import stand_in
from benchmarks.gpu_session.steps import SECONDS, Step, spare_steps, steps
from benchmarks.gpu_session.summary import summary_of
from benchmarks.whole_file import write_bytes

LOG, SUMMARY = "session.log", "summary.txt"

_LEAST_S = 12.0  # a step is not begun with less time left
_NO_SUCH_PROGRAM = 127  # exit status, as shells have it
# Versions of packages differ from machine to machine, and with them the warnings.
_PYTEST = (
    "-W", "default", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_session.reports",
    "--continue-on-collection-errors", "--tb=short", "-ofaulthandler_timeout=60",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """0 if every step that was to be run ended well, otherwise 1."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.folder.resolve()
    all_steps = [*steps(folder), *spare_steps(folder)]
    chosen = [step for step in all_steps if not arguments.only or step.name in arguments.only]
    if arguments.dry_run:
        chosen = [stand_in(step, folder) for step in chosen]
    environment, archive = brought.environment(arguments.brought), archive_of(arguments)
    session = Session(folder, archive, environment, tuple(arguments.allow_skip))
    return session.run(chosen, arguments.seconds)


def _parser() -> argparse.ArgumentParser:
    names = [step.name for step in [*steps(Path()), *spare_steps(Path())]]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session")
    add = parser.add_argument
    add_folders(parser)
    add("--seconds", type=float, default=SECONDS, help=f"for all; default: {SECONDS:g}")
    add("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    add("--allow-skip", nargs="+", default=[], metavar="TEXT",
        help="how the reasons begin for which tests may be skipped on this machine")  # fmt: skip
    add("--dry-run", action="store_true",
        help="with stand-ins for the steps, which take no GPU and no time")  # fmt: skip
    return parser


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Where results go, and where that is which was brought."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="for the results")
    add("--archive", type=Path, metavar="FILE", help=f"of them all; default: FOLDER/{ARCHIVE}")
    add("--brought", type=Path, default=brought.FOLDER, metavar="DIR",
        help="what prepare made; default: .session in the checkout")  # fmt: skip


def archive_of(arguments: argparse.Namespace) -> Path:
    file: Path = arguments.archive or arguments.folder / ARCHIVE
    return file.resolve()


@dataclass
class Session:
    """Runs steps; after each one, the folder has the log and the summary, `archive` all of it."""

    folder: Path
    archive: Path
    environment: dict[str, str]
    allowed_skips: tuple[str, ...] = ()
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, chosen: Sequence[Step], seconds: float) -> int:
        """0 if every step that was to be run ended well, otherwise 1."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stopped_by: str | None = None
        end = time.monotonic() + seconds
        with (self.folder / LOG).open("ab") as log, process.stoppable():
            try:
                for step in chosen:
                    self._run_one(step, log.fileno(), end)
            except process.Stopped as stop:
                stopped_by = str(stop)
            finally:
                print(self._keep(stopped_by))
        return int(stopped_by is not None or not all(each.is_good for each in self.outcomes))

    def _run_one(self, step: Step, log: int, end: float) -> None:
        outcome = Outcome(step)
        self.outcomes.append(outcome)
        self._forget(step)
        print(f"{step.name} ...", flush=True)
        limit, begin = min(step.seconds, end - time.monotonic()), os.fstat(log).st_size
        if limit >= _LEAST_S:
            try:
                self._begin(outcome, log, time.monotonic() + limit)
            finally:
                self._judge(outcome, begin)
        self._keep()
        print(f"    {outcome}", flush=True)

    def _forget(self, step: Step) -> None:
        """What an earlier session left must not be taken for what this one found."""
        for name in (*step.files, step.reports):
            with suppress(FileNotFoundError):
                (self.folder / name).unlink()

    def _begin(self, outcome: Outcome, log: int, end: float) -> None:
        """Runs the step, and tests behind an error that breaks the process in a new one."""
        step = outcome.step
        if step.tool and shutil.which(step.tool[0]) is None:
            outcome.was_begun, outcome.code = True, _NO_SUCH_PROGRAM
            outcome.problems.append(f"{step.tool[0]} is not on the PATH of this machine")
            return
        file, arguments = self.folder / step.reports, step.arguments
        while True:
            begin = file.stat().st_size if file.is_file() else 0
            code = self._attempt(outcome, arguments, log, end)
            outcome.code = code if code is None or outcome.code in (0, None) else outcome.code
            behind = behind_a_broken_context(read_reports(file, begin))
            if code is None or not behind:
                return
            arguments = ("pytest", "-vv", *behind)

    def _attempt(
        self, outcome: Outcome, arguments: tuple[str, ...], log: int, end: float
    ) -> int | None:
        step = replace(outcome.step, arguments=arguments)
        if step.is_tests:
            reports = ("--reports", str(self.folder / step.reports))
            step = replace(step, arguments=(*arguments, *_PYTEST, *reports))
        os.write(log, f"\n==== {step.name}: {' '.join(step.command())}\n".encode())
        environment = self.environment | dict(step.environment)
        began, limit = time.monotonic(), end - time.monotonic()
        outcome.was_begun = True
        try:
            return process.run(step.command(), environment, log, limit, self._look)
        finally:
            outcome.seconds += time.monotonic() - began

    def _judge(self, outcome: Outcome, begin: int) -> None:
        """begin: where the step's part of the log begins."""
        if outcome.step.is_tests:
            outcome.reports = one_a_test(read_reports(self.folder / outcome.step.reports))
            outcome.problems += problems_of(outcome.reports, self.allowed_skips)
        if outcome.was_begun and not outcome.is_good and not outcome.problems:
            printed = (self.folder / LOG).read_bytes()[begin:].decode(errors="replace").split("\n")
            outcome.problems.append(f"its last words: {[*filter(str.strip, printed)][-1]}")

    def _look(self) -> None:
        """While a step runs: what it has written goes along, should the session be killed now."""
        pack(self.folder, self.archive)

    def _keep(self, stopped_by: str | None = None) -> str:
        """Writes the summary and the archive; returns the summary."""
        text = summary_of(self.folder, self.outcomes)
        text += "" if stopped_by is None else f"\n==== the session was stopped by {stopped_by}"
        write_bytes(self.folder / SUMMARY, f"{text}\n".encode())
        pack(self.folder, self.archive)
        return text
