"""What a piece of work does in the library's own Python, counted; no clock is asked."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import bminf

ROOT = str(Path(bminf.__file__).parent) + "/"
INLINED = {"<listcomp>", "<setcomp>", "<dictcomp>"}  # no calls from Python 3.12 on


class Trace:
    """Counts what this thread does while it is entered.

    root: the folder whose files count, with a slash at its end.
    calls: (file, name) of a function of those -> how often it was called; a generator that is
    resumed counts, too.   entries: file -> how often the work went to it from another one, by a
    call or a return.
    """

    def __init__(self, root: str = ROOT) -> None:
        self._root = root
        self.calls: Counter[tuple[str, str]] = Counter()
        self.entries: Counter[str] = Counter()
        self._files: list[str] = []  # of the calls under way
        self._last = ""

    def __enter__(self) -> Trace:
        self._before = sys.getprofile()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._before)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self._root):
            return
        if event == "call":
            file = code.co_filename.removeprefix(self._root)
            self.calls[file, code.co_name] += code.co_name not in INLINED
            self._files.append(file)
        elif self._files:
            self._files.pop()
        if self._files and self._files[-1] != self._last:
            self._last = self._files[-1]
            self.entries[self._last] += 1
