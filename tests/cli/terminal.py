"""`bminf` as a user runs it: in a process of its own, and interrupted in that of the tests."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bminf


class Output(NamedTuple):
    """Of one command."""

    out: str
    err: str

    @property
    def error(self) -> str:
        """All that there is, the one line of an error."""
        (line,) = self.err.splitlines()
        assert self.out == "" and line.startswith("bminf: error: ")
        return line


Command = Callable[..., Output]


def started(*argv: str, **settings: Any) -> subprocess.Popen[bytes]:
    """With the bminf that this test imported.   settings: of Popen."""
    assert bminf.__file__ is not None
    environment = os.environ | {"PYTHONPATH": str(Path(bminf.__file__).parents[1])}
    command = [sys.executable, "-m", "bminf", *argv]
    return subprocess.Popen(command, env=environment, **{"preexec_fn": hear_ctrl_c, **settings})


def hear_ctrl_c() -> None:
    """Also where the tests run in the background of a script, which does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Interrupted(io.StringIO):
    """A stdout on which Ctrl-C follows the first text."""

    def write(self, text: str) -> int:
        super().write(text)
        if text.strip():
            raise KeyboardInterrupt
        return len(text)
