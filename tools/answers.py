"""`python -m tools.answers BEFORE AFTER`: the CPU time of a token, of one text alone.

Each folder is a checkout of the repository, of any age since there are built-in models. Its bminf
runs in a process of its own, and the processes take turns, one measurement each: small CPM-1, GLM
and CPM-2 of two layers and random weights, which are not packed, so that hardly anything but Python
takes time (see answers_work.py). Medians, and the least to the most of all measurements, in
milliseconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tools.overheads import Checkout, measure, running, table

MEASUREMENTS = ("cpm1", "glm", "cpm2")
_WORK = Path(__file__).with_name("answers_work.py")


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the table was printed."""
    arguments = _arguments(argv)
    with ExitStack() as stack:
        checkouts: list[Checkout] = [
            stack.enter_context(running(path, (arguments.tokens,), _WORK))
            for path in arguments.checkouts
        ]
        measure(checkouts, arguments.repeats, MEASUREMENTS)
    found = [checkout.as_json() for checkout in checkouts]
    print(table(found))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools.answers", description=__doc__, formatter_class=form)
    parser.add_argument(
        "checkouts", nargs="+", type=Path, metavar="FOLDER", help="of the repository"
    )
    parser.add_argument("--repeats", type=int, default=21, metavar="N", help="default: 21")
    parser.add_argument(
        "--tokens", type=int, default=54, metavar="N", help="of an answer; default: 54"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with all measurements")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
