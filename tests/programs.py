"""Programs that tests run in a process of its own each, and what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def said_by(program: str | Path, *arguments: object, **settings: Any) -> str:
    """What a program prints to stdout; an error of it is one of the test.

    program: a file, or lines of Python.   settings: of subprocess.run.
    """
    given = [str(program)] if isinstance(program, Path) else ["-c", program]
    command = [sys.executable, *given, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told_by(program: str | Path, *arguments: object, **settings: Any) -> Any:
    """The JSON in the last line that a program prints."""
    return json.loads(said_by(program, *arguments, **settings).splitlines()[-1])
