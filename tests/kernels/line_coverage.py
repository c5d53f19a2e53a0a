"""Which lines of the kernels were executed, by gcov.

A library writes its counts when the process that loaded it ends, so the launches run in a child.
Each measurement adds a file to a folder; `read` gives the union of all that are there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host_build import coverage_notes

PREFIX = "GCOV_PREFIX"
SUFFIXES = (".cu", ".cuh")


@dataclass
class Lines:
    """Line numbers of one source file."""

    executable: set[int] = field(default_factory=set)
    executed: set[int] = field(default_factory=set)

    @property
    def missed(self) -> list[int]:
        return sorted(self.executable - self.executed)


def read(folder: Path) -> dict[str, Lines]:
    """The lines of each source file, over all measurements in `folder`."""
    union: defaultdict[str, Lines] = defaultdict(Lines)
    for path in sorted(folder.glob("*.json")):
        for name, lines in json.loads(path.read_text()).items():
            union[name].executable |= set(lines["executable"])
            union[name].executed |= set(lines["executed"])
    return dict(union)


def is_measured() -> bool:
    """Whether this process is the child."""
    return PREFIX in os.environ


def measure(command: Sequence[str], folder: Path) -> int:
    """Runs `command` and writes what it executed to `folder`. Returns its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as counts:
        environment = {**os.environ, PREFIX: counts, "GCOV_PREFIX_STRIP": "99"}
        done = subprocess.run(command, env=environment)
        lines = _lines(Path(counts))
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir=folder, delete=False) as file:
        json.dump(lines, file)
    return done.returncode


def _lines(counts: Path) -> dict[str, dict[str, list[int]]]:
    union: defaultdict[str, Lines] = defaultdict(Lines)
    for path in sorted(counts.glob("*.gcda")):
        shutil.copy(coverage_notes(path.name), path.with_suffix(".gcno"))
        for file in _gcov(path):
            if file["file"].endswith(SUFFIXES):
                lines = union[file["file"]]
                counted = {line["line_number"]: line["count"] for line in file["lines"]}
                lines.executable |= counted.keys()
                lines.executed |= {number for number, count in counted.items() if count}
    return {
        name: {"executable": sorted(lines.executable), "executed": sorted(lines.executed)}
        for name, lines in union.items()
    }


def _gcov(counts: Path) -> list[dict[str, Any]]:
    """What gcov says of each source file of a build."""
    command = ["gcov", "--json-format", "--stdout", counts.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=counts.parent)
    files: list[dict[str, Any]] = json.loads(done.stdout)["files"]
    return files
