"""Where a text ends: before the first stop string, wherever the borders of tokens are."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """A text that comes in pieces, up to the first of `stops`.

    What may be the beginning of one is held back until it is known whether it is.
    is_stopped: whether one has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def feed(self, piece: str) -> str:
        """The text that is final now and was not before; it may be empty."""
        if self.is_stopped:
            return ""
        text, self._held = self._held + piece, ""
        found = [(start + len(stop), start) for stop in self._stops
                 if (start := text.find(stop)) >= 0]  # fmt: skip
        if found:  # the one that was complete first, so that it does not depend on the pieces
            self.is_stopped = True
            return text[: min(found)[1]]
        num_final = len(text) - self._num_held(text)
        self._held = text[num_final:]
        return text[:num_final]

    def finish(self) -> str:
        """The rest."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = min(len(text), max((len(stop) for stop in self._stops), default=0) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stops)), 0)
