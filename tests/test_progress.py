"""Progress: on a terminal, and nowhere else."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import bminf
from bminf.progress import progress_bar, spinner

pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")

BARS = """
import time
from bminf import progress
from bminf.cli.demo import TokenBar
progress._FIRST_S = progress._REFRESH_S = 0.01
with progress.spinner("spinning"):
    time.sleep(0.2)
for _ in progress.progress_bar(range(3), desc="stepping"):
    pass
bar = TokenBar(2, "telling")
for _ in range(3):
    bar.put(None)
bar.close()
"""


def variables(**more: str) -> dict[str, str]:
    """The environment of a process that uses the bminf that this test imported."""
    assert bminf.__file__ is not None
    return os.environ | {"PYTHONPATH": str(Path(bminf.__file__).parents[1])} | more


def on_terminal(**environment: str) -> str:
    """What BARS writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", BARS], stderr=theirs, env=variables(**environment)
    )
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 4096):
            said += piece
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return said.decode()


def test_a_terminal_sees_all_of_it() -> None:
    said = on_terminal()
    for expected in ("spinning: 00:0", "stepping: 100%", "telling: 100%", "2/2"):
        assert expected in said


def test_a_spinner_leaves_no_line() -> None:
    spun, _, _ = on_terminal().partition("stepping")
    assert "spinning" in spun and "\n" not in spun


def test_tqdm_disable_turns_all_of_it_off() -> None:
    assert on_terminal(TQDM_DISABLE="1") == ""


def test_a_file_sees_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARS], capture_output=True, text=True, env=variables()
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_without_stderr_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with spinner("quiet"):
        assert list(progress_bar([1, 2])) == [1, 2]
