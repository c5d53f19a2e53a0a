"""Progress bars: on a terminal only, so that a log holds no line that overwrites itself."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> Any:
    """A tqdm bar on stderr, with its arguments; a silent one where stderr is no terminal.

    On a terminal tqdm's own TQDM_DISABLE=1 turns it off: `disable` is left out there, because an
    argument that is given, even None, wins over the environment.
    """
    if not is_terminal():
        settings["disable"] = True
    return tqdm(iterable, **settings)


def is_terminal() -> bool:
    """Whether stderr is one; a program without a console has no stderr at all."""
    return sys.stderr is not None and sys.stderr.isatty()
