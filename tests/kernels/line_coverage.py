"""Which lines of the kernels were executed, by gcov.

A library writes its counts when the process that loaded it ends, so the launches run in a child.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from host_build import coverage_notes

PREFIX = "GCOV_PREFIX"
SUFFIXES = (".cu", ".cuh")


def missed(file: Path) -> dict[str, list[int]]:
    """The lines of each source file that were not executed, by what `measure` wrote."""
    counts: dict[str, dict[str, int]] = json.loads(file.read_text())
    return {
        name: [int(line) for line, count in lines.items() if count == 0]
        for name, lines in counts.items()
    }


def is_measured() -> bool:
    """Whether this process is the child."""
    return PREFIX in os.environ


def measure(command: Sequence[str], file: Path) -> int:
    """Runs `command`, and writes how often it executed each line. Returns its exit code."""
    with tempfile.TemporaryDirectory() as counts:
        environment = {**os.environ, PREFIX: counts, "GCOV_PREFIX_STRIP": "99"}
        done = subprocess.run(command, env=environment)
        file.write_text(json.dumps(_counts(Path(counts))))
    return done.returncode


def _counts(folder: Path) -> dict[str, dict[int, int]]:
    """Of the executable lines of each source file, over all libraries."""
    union: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for path in sorted(folder.glob("*.gcda")):
        shutil.copy(coverage_notes(path.name), path.with_suffix(".gcno"))
        for file in _gcov(path):
            if file["file"].endswith(SUFFIXES):
                for line in file["lines"]:
                    union[file["file"]][line["line_number"]] += line["count"]
    return {name: dict(sorted(lines.items())) for name, lines in union.items()}


def _gcov(counts: Path) -> list[dict[str, Any]]:
    """What gcov says of each source file of a build."""
    command = ["gcov", "--json-format", "--stdout", counts.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=counts.parent)
    files: list[dict[str, Any]] = json.loads(done.stdout)["files"]
    return files
