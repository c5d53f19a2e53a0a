"""`python -m benchmarks.gpu_session FOLDER`: all that needs a GPU, in under 8 minutes.

Tests marked gpu and the benchmarks, each in a process of its own with a time limit; a step that
fails does not keep the next from running. FOLDER gets the JSON files, session.log with all that was
printed, summary.txt, and session.tgz with all of them, written anew after each step.

`python -m benchmarks.gpu_session prepare`, before and without a GPU: what has to be brought along.
`python -m benchmarks.gpu_session inspect FOLDER`: the kernels under compute-sanitizer and ncu.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

# Imported when asked for: the session itself needs no torch, and should not wait for it.
COMMANDS = {"prepare": "preparation", "inspect": "inspection"}


def main(argv: Sequence[str]) -> int:
    """The exit status of the command, which is the session where none is named."""
    name = COMMANDS.get(argv[0]) if argv else None
    module = import_module(f"benchmarks.gpu_session.{name or 'session'}")
    code: int = module.main(argv if name is None else argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
