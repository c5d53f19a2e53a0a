"""Text of a tokenizer of transformers, as its ids come one by one."""

from __future__ import annotations

from typing import Any


class PretrainedStream:
    """The text of ids that are fed one by one, without special tokens.

    All pieces together, with what `finish` gives, are what the tokenizer decodes of all ids; no
    piece ends within a character.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._end = 0  # of the ids that the next piece is told apart by

    def feed(self, token_id: int) -> str:
        """The text that is final now and was not before; it may be empty."""
        self._ids.append(token_id)
        return self._next(is_last=False)

    def finish(self) -> str:
        """The rest."""
        return self._next(is_last=True)

    def _next(self, is_last: bool) -> str:
        """Only the last few ids are decoded: what they add to those whose text was given."""
        before = self._decoded(self._start, self._end)
        now = self._decoded(self._start, len(self._ids))
        is_cut = now.endswith("\N{REPLACEMENT CHARACTER}")  # within a character, most likely
        if len(now) <= len(before) or (is_cut and not is_last):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return now[len(before) :]

    def _decoded(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text
