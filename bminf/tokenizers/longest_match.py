"""Words into tokens: the longest one first, from left to right."""

from __future__ import annotations

from collections.abc import Mapping

MAX_WORD_LENGTH = 200
"""A longer word is unknown as a whole."""


class LongestMatch:
    """Cuts words into tokens.

    ids: the id of each token.   unknown: the id of a character that begins no token, and of a word
    of more than MAX_WORD_LENGTH characters.
    """

    def __init__(self, ids: Mapping[str, int], unknown: int) -> None:
        self._ids = ids
        self._unknown = unknown
        self._longest_token = max(map(len, ids), default=0)

    def ids(self, word: str) -> list[int]:
        if len(word) > MAX_WORD_LENGTH:
            return [self._unknown]
        ids: list[int] = []
        start = 0
        while start < len(word):
            number, start = self._longest(word, start)
            ids.append(number)
        return ids

    def spelling(self, piece: str, start: int) -> str:
        """How the vocabulary spells a piece that stands at `start` in its word."""
        return piece

    def _longest(self, word: str, start: int) -> tuple[int, int]:
        """The id of the longest token at `start`, and where it ends."""
        for end in range(min(len(word), start + self._longest_token), start, -1):
            number = self._ids.get(self.spelling(word[start:end], start))
            if number is not None:
                return number, end
        return self._unknown, start + 1
