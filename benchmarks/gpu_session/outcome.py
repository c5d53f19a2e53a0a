"""What became of a step, and what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_session.steps import Step

LEGITIMATE_SKIPS = {
    "needs two GPUs": "a machine with one cannot show it",
    "the targets are for": "nothing is promised of the speed of other cards",
}
"""How the reasons begin for which a test may be skipped where there is a GPU, and why. Free memory
is none of them: a card that has too little of it after other tests has lost it."""

# After one of these nothing runs in the process any more: what fails behind it says nothing.
_BROKEN_CONTEXT = re.compile(
    "illegal memory access|illegal address|illegal instruction|misaligned address|"
    "unspecified launch failure|device-side assert|hardware stack error",
    re.IGNORECASE,
)
_MOST_NOTES = 20


@dataclass(frozen=True)
class Report:
    """Of a test, or of a file that could not be collected. outcome: passed, failed, skipped."""

    test: str
    outcome: str
    reason: str = ""
    text: str = ""
    seconds: float = 0.0

    @property
    def breaks_the_context(self) -> bool:
        return self.outcome == "failed" and _BROKEN_CONTEXT.search(self.text) is not None


def read_reports(file: Path, begin: int = 0) -> list[Report]:
    """What stands from byte `begin` on, in order; a last line that is cut off is left out."""
    if not file.is_file():
        return []
    lines = file.read_bytes()[begin:].splitlines(keepends=True)
    return [Report(**json.loads(line)) for line in lines if line.endswith(b"\n")]


def one_a_test(reports: Iterable[Report]) -> list[Report]:
    """A failure stays, unless it was that of a broken context and the test was run once more."""
    found: dict[str, Report] = {}
    for report in reports:
        known = found.get(report.test)
        if known is None or known.outcome != "failed" or known.breaks_the_context:
            found[report.test] = report
    return list(found.values())


def behind_a_broken_context(reports: Iterable[Report]) -> list[str]:
    """The tests, of one process, that failed because an earlier one had broken it."""
    return [report.test for report in reports if report.breaks_the_context][1:]


@dataclass
class Outcome:
    """code: the exit status, None if the step was stopped or not begun.

    reports: of its tests.   problems: why it counts as failed, where it does.
    """

    step: Step
    code: int | None = None
    seconds: float = 0.0
    was_begun: bool = False
    reports: list[Report] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """A spare step for which no time was left takes nothing from a session."""
        if not self.was_begun:
            return self.step.is_spare
        return self.code == 0 and not self.problems

    def __str__(self) -> str:
        notes = [shortened(note) for note in self.problems[:_MOST_NOTES]]
        more = len(self.problems) - len(notes)
        notes += [f"and {more} more"] if more else []
        return "\n    ".join([f"{self.step.name}: {self._status()}", *notes])

    def _status(self) -> str:
        if not self.was_begun:
            return "not begun, no time was left"
        verdict = "ok" if self.is_good else "FAILED" if self.code is not None else "STOPPED"
        status = "" if self.code in (0, None) else f", exit status {self.code}"
        return f"{verdict}{status}, {self.seconds:.0f} s{self._counts()}"

    def _counts(self) -> str:
        if not self.step.is_tests:
            return ""
        outcomes = [report.outcome for report in self.reports]
        counts = [f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped")]
        return f", {', '.join(counts)}"


def problems_of(reports: Sequence[Report], allowed: Sequence[str]) -> list[str]:
    """What is wrong with a step of tests. allowed: beginnings of reasons for a skip."""
    found = [f"{r.test}: {r.reason}" for r in reports if r.outcome == "failed"]
    skipped = [report for report in reports if report.outcome == "skipped"]
    if not reports:
        found.append("no test was run: nothing was collected, or pytest did not begin")
    elif len(skipped) == len(reports):
        found.append("every test was skipped")
    legitimate = (*LEGITIMATE_SKIPS, *allowed)
    return [*found, *_undeclared([r for r in skipped if not r.reason.startswith(legitimate)])]


def _undeclared(skipped: Sequence[Report]) -> Iterator[str]:
    """A line for each reason."""
    for reason in dict.fromkeys(report.reason for report in skipped):
        names = [report.test for report in skipped if report.reason == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{more}: skipped, which is not declared: {reason}"


def shortened(text: str, most: int = 300) -> str:
    """On one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."
