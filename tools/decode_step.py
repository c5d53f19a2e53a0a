"""`python -m tools.decode_step BEFORE AFTER`: the host's time for a decode step of CPM-2.

Each folder is a checkout of the repository. Its bminf runs in a process of its own, and the
processes take turns, one measurement each: CPU seconds of a step of 24 decoder layers with packed
weights, one token, with kernels launched on a GPU that is not there (see decode_step_work.py).
Medians, and the least to the most of all measurements, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tools.overheads import Checkout, measure, running, table

_WORK = Path(__file__).with_name("decode_step_work.py")


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the table was printed."""
    arguments = _arguments(argv)
    with ExitStack() as stack:
        checkouts: list[Checkout] = [
            stack.enter_context(running(path, (), _WORK)) for path in arguments.checkouts
        ]
        measure(checkouts, arguments.repeats, ["step"])
    found = [checkout.as_json() for checkout in checkouts]
    print(table(found))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools.decode_step", description=__doc__, formatter_class=form)
    parser.add_argument(
        "checkouts", nargs="+", type=Path, metavar="FOLDER", help="of the repository"
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="default: 9")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with all measurements")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
