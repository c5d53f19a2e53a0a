"""Draws the pictures of docs/ that no command of bminf draws:

    python -m tools.pictures [FOLDER]

All are of CPM-2 on a GTX 1060, and predicted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bminf
from bminf.cli.gpus import speeds_of

CARD = "GTX 1060"
LENGTH = 512  # tokens of prompt and answer
LIMIT = "6GB"
LIMITS = [tenths * 10**8 for tenths in range(12, 92, 4)]

_DOCS = Path(__file__).resolve().parents[1] / "docs"


def pictures() -> dict[str, Any]:
    """Name of a file -> figure."""
    return {"timeline-cpm2.svg": _timeline(), "speed-cpm2.svg": _speed()}


def _plan(limit: int | str, quantization: str = "int8") -> bminf.Plan:
    return bminf.models.plan_model("cpm2", limit, quantization, max_length=LENGTH)


def _timeline() -> Any:
    trace = bminf.plot.simulate(_plan(LIMIT), *speeds_of(CARD))
    title = f"Two tokens of CPM-2, int8, within 6 GB on a {CARD}, predicted"
    return bminf.plot.timeline(trace, title=title)


def _speed() -> Any:
    curves = {}
    for name in ("int8", "int4"):
        plan_at = partial(_plan, quantization=name)
        curves[name] = bminf.plot.predicted_speeds(plan_at, LIMITS, *speeds_of(CARD))
    title = f"CPM-2 on a {CARD} by memory limit, predicted"
    return bminf.plot.speed_by_limit(curves, limits={"6 GB": 6 * 10**9}, title=title)


def main(argv: Sequence[str]) -> int:
    """0, after each picture was written."""
    folder = Path(argv[0]) if argv else _DOCS
    for name, figure in pictures().items():
        bminf.plot.save(figure, folder / name)
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
