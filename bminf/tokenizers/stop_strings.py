"""Texts that end an answer, found as the answer comes, whatever pieces it comes in."""

from __future__ import annotations

from collections.abc import Sequence

from bminf.errors import ArgumentError
from bminf.tokenizers.base import check_text

MAX_STOP = 64
"""Stop strings of a text."""


class StopStrings:
    """A text as it comes, up to the first of its stop strings.

    All that `feed` gives, with what `finish` gives, is the text before the stop string that is
    complete first; of several that end at the same character the longest counts. That holds for any
    pieces, so a stop string may begin in one and end in another. What may be the beginning of one
    is held back until that is known.

    stop: see check_stop().   is_found: whether one has come; nothing is given after that.
    """

    def __init__(self, stop: Sequence[str] | str | None) -> None:
        self._stop = check_stop(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.is_found = False

    def feed(self, piece: str) -> str:
        """The text that is certain now and was not before; it may be empty."""
        if self.is_found:
            return ""
        text = self._held + piece
        found = [(at + len(one), at) for one in self._stop if (at := text.find(one)) >= 0]
        if found:
            self.is_found, self._held = True, ""
            return text[: min(found)[1]]
        end = self._end_of_certain(text)
        self._held = text[end:]
        return text[:end]

    def finish(self) -> str:
        """What was held back, because the text is at its end; nothing when asked again."""
        held, self._held = self._held, ""
        return held

    def _end_of_certain(self, text: str) -> int:
        """Where the longest end of the text begins that a stop string may begin with."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(one.startswith(text[start:]) for one in self._stop):
                return start
        return len(text)


def check_stop(stop: Sequence[str] | str | None) -> tuple[str, ...]:
    """A stop string, or at most MAX_STOP of them, as a tuple; None is none.

    Raises ArgumentError for more of them, for what is no text, and for an empty one.
    """
    if isinstance(stop, str):
        stop = [stop]
    elif stop is not None and not isinstance(stop, Sequence):
        raise ArgumentError(f"stop is a {type(stop).__name__}; give a text, or a list of texts")
    found = tuple(stop or ())
    if len(found) > MAX_STOP:
        raise ArgumentError(f"stop has {len(found)} texts; accepted: at most {MAX_STOP}")
    for one in found:
        if not isinstance(one, str) or not one:
            raise ArgumentError(f"stop holds {one!r}; give texts that are not empty")
        check_text(one)
    return found
