"""What a session found, as text: the end of it matters most, as the last lines are what is seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu_session.outcome import Outcome, shortened
from benchmarks.gpu_session.steps import GLM, PROBE, ZOO

_MOST_FAILURES = 12


def summary_of(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Times, then what failed and which targets were reached."""
    kernels = sorted(folder.glob("kernels-*.json"))
    parts = ["", *(["==== us by rows of activations; * what the op chooses"] if kernels else [])]
    parts += [line for file in kernels for line in _part(file, report.lines)]
    for title, name, lines in (
        ("CPM-2", ZOO, _table_lines),
        ("GLM-130B", GLM, _table_lines),
        ("the machine", PROBE, _probe_lines),
    ):
        if (folder / name).is_file():
            parts += [f"==== {title}", *_part(folder / name, lines)]
    for file in kernels:
        parts += [f"==== {file.stem}", *_part(file, _findings)]
    return "\n".join([*parts, "==== steps", *map(str, outcomes)])


def _part(file: Path, lines: Callable[[dict[str, Any]], Sequence[str]]) -> Sequence[str]:
    """Its lines. What one file lacks must not cost the others' summary, or the archive."""
    try:
        return list(lines(json.loads(file.read_text(encoding="utf-8"))))
    except Exception as error:
        return [shortened(f"{file.name} cannot be shown: {type(error).__name__}: {error}")]


def _findings(content: dict[str, Any]) -> list[str]:
    failures = [result for result in content["results"] if result["failure"]]
    left_out = content["parameters"]["left_out"]
    return [
        *(shortened(f"{r['name']}: {r['failure']}") for r in failures[:_MOST_FAILURES]),
        *([f"{len(failures) - _MOST_FAILURES} more"] if len(failures) > _MOST_FAILURES else []),
        *([f"not measured, of lack of time: {len(left_out)} groups"] if left_out else []),
        *map(str, report.targets(content)),
    ]


def _table_lines(content: dict[str, Any]) -> list[str]:
    return report.table(content).splitlines()


def _probe_lines(content: dict[str, Any]) -> list[str]:
    return [*_flat("", content["found"]), *(f"FAILED: {text}" for text in content["failures"])]


def _flat(prefix: str, found: dict[str, Any]) -> Iterator[str]:
    """A line for each number: its place, and it."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}, ", value)
        else:
            yield f"{prefix}{name}: {value}"
