"""Signs of life on a terminal for everything that takes over a second."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bminf.progress import is_terminal, progress_bar

_FIRST_S, _REFRESH_S = 1.0, 0.5


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """Shows `text` and the seconds gone by, if the body takes over a second."""
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
    with progress_bar(total=0, desc=text, bar_format="{desc}: {elapsed}") as bar:
        if bar.disable:  # TQDM_DISABLE; such a bar has no start either
            return
        bar.start_t -= _FIRST_S
        while not stop.wait(_REFRESH_S):
            bar.refresh()


class TokenBar:
    """A bar that steps once a token; goes to `generate` as its streamer."""

    def __init__(self, max_new_tokens: int, text: str) -> None:
        self.num_tokens = 0
        self._has_prompt = False
        self._bar = progress_bar(total=max_new_tokens, desc=text, unit="token")

    def put(self, token_ids: Any) -> None:
        """Counts one token; the first call brings the prompt."""
        if self._has_prompt:
            self.num_tokens += 1
            self._bar.update()
        self._has_prompt = True

    def end(self) -> None:
        """The last token has come; the name is the streamers'."""

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
