"""A step's process: its limit, its end, and that it never outlives the session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]

_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PATIENCE_S = 4.0  # for what a process has to say after SIGINT
_LOOK_S = 5.0
_BOUND = str(Path(__file__).with_name("bound.py"))


class Stopped(BaseException):
    """The session was told to end, by the signal that is named."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Signals that end a process raise Stopped, once: the time after that is for the results."""

    def stop(number: int, _: FrameType | None) -> None:
        for each in _ENDS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    # A hang-up that nohup keeps away is none.
    heeded = [number for number in _ENDS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in {*heeded, signal.SIGINT}}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: int,
    limit: float,
    look: Callable[[], None],
) -> int | None:
    """The exit status; None if the limit, in seconds, was reached.

    log: a file descriptor for all that is printed.   look: called every few seconds.
    """
    process = subprocess.Popen(
        [sys.executable, "-S", _BOUND, str(os.getpid()), *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    try:
        code = _wait(process, time.monotonic() + limit, look)
        if code is None:
            _interrupt(process)
        return code
    finally:
        _send(process, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # where a driver does not let go of it
            process.wait(_PATIENCE_S)


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the whole group, which may outlive the process; or to the process before it has one."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        process.send_signal(number)


def _wait(process: subprocess.Popen[bytes], end: float, look: Callable[[], None]) -> int | None:
    while True:
        left = end - time.monotonic()
        try:
            return process.wait(max(0.0, min(_LOOK_S, left)))
        except subprocess.TimeoutExpired:
            if left <= 0:
                return None
            look()


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Python unwinds at SIGINT, unless it is inside a compiler or a driver."""
    _send(process, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE_S)
