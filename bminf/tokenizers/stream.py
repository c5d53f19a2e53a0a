"""Text as it comes: ids one at a time into the text that is final so far."""

from __future__ import annotations

import warnings

from bminf.errors import ArgumentError
from bminf.tokenizers.base import Tokenizer, VocabularyTokenizer
from bminf.tokenizers.joining import Joiner


class TextStream:
    """The text of ids that are fed one by one.

    All pieces together, with what `finish` gives, are `tokenizer.decode` of all ids. A piece is
    held back as long as a later id could change it. With a tokenizer of this package the cost of an
    id does not grow with their number. A tokenizer of another kind does not say what is final: its
    text comes as a whole from `finish`, and a warning says so.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._joiner = _joiner(tokenizer)
        self._is_finished = False

    def feed(self, number: int) -> str:
        """The text that is final now and was not before; it may be empty.

        Raises ArgumentError for an id out of range, and after `finish`.
        """
        if self._is_finished:
            raise ArgumentError("the stream is finished; make a new TextStream for other ids")
        self._tokenizer.tokens([number])  # raises for an id out of range
        return self._joiner.add(number)

    def finish(self) -> str:
        """The rest of the text; nothing when asked again."""
        if self._is_finished:
            return ""
        self._is_finished = True
        return self._joiner.end()


class _WholeText:
    """The joiner of a tokenizer of which only `decode` is known."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def add(self, number: int) -> str:
        self._ids.append(number)
        return ""

    def end(self) -> str:
        return self._tokenizer.decode(self._ids)


def _joiner(tokenizer: Tokenizer) -> Joiner:
    if isinstance(tokenizer, VocabularyTokenizer):
        return tokenizer.joiner()
    warnings.warn(
        f"a {type(tokenizer).__name__} does not say which text a later token may change, so its "
        "text comes at the end; a tokenizer of bminf.tokenizers gives it as it comes",
        stacklevel=3,
    )
    return _WholeText(tokenizer)
