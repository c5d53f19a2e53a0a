"""A plugin of pytest: a line of JSON for each test, written at once.

What a killed pytest had found out is in the file, where a report at its end would not be there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

_MOST_CHARACTERS = 4000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reports", type=Path, metavar="FILE")


def pytest_configure(config: pytest.Config) -> None:
    file: Path | None = config.getoption("--reports")
    if file is not None:
        config.pluginmanager.register(_Reports(file))


class _Reports:
    """Appends to `file`: the session runs pytest again for tests behind a broken context."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._write(report)

    def _write(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, **_texts(report)}
        line["seconds"] = round(getattr(report, "duration", 0.0), 3)  # none of a collection
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")


def _texts(report: pytest.TestReport | pytest.CollectReport) -> dict[str, str]:
    """reason: one line.   text: all of it, or its end."""
    if report.outcome == "passed":
        return {}
    text = report.longreprtext
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return {"reason": report.longrepr[2].removeprefix("Skipped: "), "text": text}
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = text.strip().splitlines() or [""]
    reason = lines[-1] if crash is None else crash.message
    return {"reason": reason, "text": text[-_MOST_CHARACTERS:]}
