"""Progress bars, on a terminal only, so that logs contain no lines that overwrite themselves."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_FIRST_S, _REFRESH_S = 1.0, 0.5


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> Any:
    """A tqdm bar on stderr, with tqdm's arguments; a silent one if stderr is not a terminal.

    On a terminal TQDM_DISABLE=1 turns it off: `disable` is not passed there, because tqdm prefers
    an argument, even None, to the environment.
    """
    if not is_terminal():
        settings["disable"] = True
    return tqdm(iterable, **settings)


def is_terminal() -> bool:
    """Whether stderr is a terminal; a program without a console has no stderr at all. Of several
    ranks, the first has it."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """Shows `text` and the elapsed seconds, if the body takes over a second."""
    if not is_terminal():
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_spin, args=(text, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _spin(text: str, stop: threading.Event) -> None:
    if stop.wait(_FIRST_S):
        return
    with progress_bar(total=0, desc=text, bar_format="{desc}: {elapsed}", leave=False) as bar:
        if bar.disable:  # TQDM_DISABLE; such a bar has no start either
            return
        bar.start_t -= _FIRST_S
        while not stop.wait(_REFRESH_S):
            bar.refresh()
