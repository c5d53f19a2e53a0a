"""A plugin of pytest for the steps of tests in a GPU session: `-p gpu_reports`.

It writes a line for each test, ends pytest behind a test that has broken its process, so that the
others can go on in a new one, and fails where tests were skipped that should have run.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEGITIMATE_SKIPS = {
    "needs two GPUs": "a machine with one cannot show it",
    "the targets are for": "nothing is promised of the speed of other cards",
}
"""How the reasons start for which a test may be skipped where there is a GPU, and why. Free memory
is none of them: a card that has too little of it after other tests has lost it."""

REPORTS, ALLOWED = "GPU_SESSION_REPORTS", "GPU_SESSION_ALLOWED_SKIPS"  # variables
_INTERRUPTED, NEEDS_NEW_PROCESS = 2, 87  # exit statuses: of pytest; of tests that are to go on
# After one of these nothing runs in a process any more: what fails behind it says nothing.
_BREAKS = re.compile(
    "illegal memory access|illegal address|illegal instruction|misaligned address|"
    "unspecified launch failure|device-side assert|hardware stack error",
    re.IGNORECASE,
)


def read_reports() -> list[dict[str, Any]]:
    """Of tests, and of files that could not be collected; also of processes that are broken."""
    file = Path(os.environ[REPORTS])
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leaves out what an earlier process has run."""
    known = {report["test"] for report in read_reports()}
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logreport(report: Any) -> None:
    """Written at once, so that it is there where pytest is killed."""
    if report.outcome == "passed" and getattr(report, "when", None) != "call":
        return
    text, crash = report.longreprtext, getattr(report.longrepr, "reprcrash", None)
    reason = crash.message if crash else text.strip().rpartition("\n")[2]
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        reason = report.longrepr[2].removeprefix("Skipped: ")
    line = {"test": report.nodeid, "outcome": report.outcome, "reason": reason}
    line |= {"text": text[-4000:], "seconds": round(getattr(report, "duration", 0.0), 3)}
    with open(os.environ[REPORTS], "a", encoding="utf-8") as file:
        file.write(f"{json.dumps(line)}\n")


pytest_collectreport = pytest_runtest_logreport


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Ends pytest behind a test that has broken the process."""
    if any(r["test"] == nodeid and _BREAKS.search(r["text"]) for r in read_reports()):
        raise KeyboardInterrupt


def pytest_sessionfinish(session: Any) -> None:
    """The exit status says what was wrong in any of the processes, and what pytest lets pass."""
    reports = read_reports()
    is_broken = any(_BREAKS.search(last["text"]) for last in reports[-1:])
    if session.exitstatus == _INTERRUPTED and is_broken:
        session.exitstatus = NEEDS_NEW_PROCESS
    elif problems_of(reports) or any(report["outcome"] == "failed" for report in reports):
        session.exitstatus = session.exitstatus or 1


def pytest_unconfigure(config: Any) -> None:
    """Says it last, where it is seen."""
    for problem in problems_of(read_reports()):
        config.get_terminal_writer().line(problem)


def problems_of(reports: Sequence[dict[str, Any]]) -> list[str]:
    """What pytest lets pass."""
    allowed = (*LEGITIMATE_SKIPS, *os.environ[ALLOWED].splitlines())
    skipped = Counter(report["reason"] for report in reports if report["outcome"] == "skipped")
    problems = [
        f"{count} skipped, which is not declared: {reason}"
        for reason, count in skipped.items()
        if not reason.startswith(allowed)
    ]
    if skipped.total() == len(reports):
        problems.append("every test was skipped" if reports else "no test was run")
    return problems
