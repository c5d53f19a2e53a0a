"""How long tests take, from a committed list: which of them are slow, and which files come first.

`seconds.txt` has the CPU seconds of one test of each function that takes long, over all its cases.
It is a matter of speed alone: a function that is not in it, as it is new, is quick. Written anew,
from a run of the whole suite on any machine, by

    BMINF_REWRITE_SECONDS=1 pytest -n 2 --dist loadfile
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("seconds.txt")

QUICK_S = 0.1
"""What the cases of one function may take together in the quick run; the others are slow."""

IS_REWRITTEN = "BMINF_REWRITE_SECONDS" in os.environ


def seconds() -> dict[str, float]:
    """CPU seconds of one case of `file::function`."""
    lines = LIST.read_text(encoding="utf-8").splitlines() if LIST.exists() else []
    pairs = (line.split(maxsplit=1) for line in lines)
    return {name: float(value) for value, name in pairs}


def mark_slow(items: list[pytest.Item]) -> None:
    """Of each function, leave as many cases quick as fit into QUICK_S, evenly spaced."""
    known = seconds()
    for name, cases in _by_function(items).items():
        quick = min(len(cases), int(QUICK_S / known[name])) if name in known else len(cases)
        kept = {i * len(cases) // quick for i in range(quick)}
        for i, case in enumerate(cases):
            if i not in kept:
                case.add_marker("slow")


def longest_files_first(items: list[pytest.Item]) -> None:
    """So that processes that take a file at a time end at about the same time."""
    known, total = seconds(), defaultdict[str, float](float)
    for item in items:
        total[_file(item)] += known.get(_function(item), 0.0)
    items.sort(key=lambda item: -total[_file(item)])


def _by_function(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    found: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        found[_function(item)].append(item)
    return found


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


class Recorder:
    """Measures each test where it runs, and writes the list where the reports come together."""

    def __init__(self) -> None:
        self._start_s = 0.0
        self._taken: dict[str, list[float]] = defaultdict(list)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self._start_s = cpu_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
        report = yield
        if call.when == "teardown":
            report.user_properties.append(("cpu_s", cpu_s() - self._start_s))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        taken = dict(report.user_properties).get("cpu_s")
        if taken is not None:
            self._taken[report.nodeid.partition("[")[0]].append(float(taken))

    def pytest_sessionfinish(self) -> None:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            LIST.write_text("".join(self._lines()), encoding="utf-8")

    def _lines(self) -> Iterator[str]:
        for name, taken in sorted(self._taken.items()):
            if sum(taken) > QUICK_S:
                yield f"{sum(taken) / len(taken):.3f} {name}\n"


def cpu_s() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])
